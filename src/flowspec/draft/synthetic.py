"""The draft of the synthetic language: it knows every context, as well as its calibration says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowspec.core import FINAL
from flowspec.draft.base import Accepted, steady_steps
from flowspec.model.synthetic import Language, increments
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints


class SyntheticSource:
    name = "synthetic"
    feature_layers: tuple[int, ...] = (FINAL,)  # as an EAGLE head does: the prompt's features travel

    def __init__(self, language: Language) -> None:
        self.language = language
        self.block_len = language.quality.block_len
        # A block draft does not extrapolate: what a new block knows better is worth its pass.
        self.steady_steps = 1 if self.block_len > 1 else steady_steps(language.usual_hit_rates)

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> SyntheticDraft:
        """The calibrated rates are those of drafts that know nothing of the noise."""
        return SyntheticDraft(self, prompt_ids, top_k)


class SyntheticDraft:
    """One request: the context of the prefix, and of every node that was expanded."""

    def __init__(self, source: SyntheticSource, prompt_ids: Sequence[int], top_k: int) -> None:
        self._source = source
        self._top_k = top_k
        self._prefix = np.zeros(2, dtype=np.int64)
        self._prefix_len = 0
        self._contexts: dict[int, NDArray[np.int64]] = {}  # by node id
        self._anchor_len = 0  # the prefix when the newest block was drafted
        self._firsts: dict[int, int] = {}  # by node id: the newest block's first guess of what follows
        self._detours: dict[int, int] = {}  # by node id: see ``Language.draft``; of the newest block
        self._append(prompt_ids[:-1])

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """The prompt was read when the draft was opened."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._append(accepted.token_ids)
        node_ids, token_ids = [*accepted.node_ids, tree.root_id], [*accepted.token_ids, int(tree.token_ids[0])]
        missed = (self._firsts.get(i) != token for i, token in zip(node_ids, token_ids[1:], strict=False))
        self._detours[tree.root_id] = self._detours.get(node_ids[0], 0) + sum(missed)
        alive = set(tree.node_ids.tolist())
        self._contexts = {node_id: context for node_id, context in self._contexts.items() if node_id in alive}
        self._firsts = {node_id: token for node_id, token in self._firsts.items() if node_id in alive}
        self._detours = {node_id: num for node_id, num in self._detours.items() if node_id in alive}

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        if rows[0] == 0:
            self._anchor_len, self._firsts, self._detours = self._prefix_len, {}, {tree.root_id: 0}
        self._expand(tree, rows)
        return True

    def reread(self, tree: DraftTree) -> None:
        self._expand(tree, np.zeros(1, dtype=np.int64))

    def _expand(self, tree: DraftTree, rows: Ints) -> None:
        parents = tree.parents[rows]
        above = [self._prefix if row < 0 else self._contexts[int(tree.node_ids[row])] for row in parents.tolist()]
        contexts = np.stack(above) + increments(tree.token_ids[rows], tree.depths[rows] + self._prefix_len)
        self._contexts.update(zip(tree.node_ids[rows].tolist(), contexts, strict=True))
        if self._source.block_len > 1:
            self._read_block(tree, rows, contexts)
            return
        staleness = np.where(parents < 0, 0, tree.staleness[parents]) + 1
        tree.expand(rows, *self._source.language.draft(contexts, staleness, self._top_k), staleness)

    def _read_block(self, tree: DraftTree, rows: Ints, contexts: NDArray[np.int64]) -> None:
        """Children from the newest block's guesses."""
        detours = np.array([self._detours_of(tree, row) for row in rows.tolist()])
        levels = self._levels(tree, rows)
        token_ids, logprobs = self._source.language.draft(contexts, levels, self._top_k, detours)
        self._firsts.update(zip(tree.node_ids[rows].tolist(), token_ids[:, 0].tolist(), strict=True))
        tree.expand(rows, token_ids, logprobs, levels)

    def _levels(self, tree: DraftTree, rows: Ints) -> Ints:
        """The levels of the newest block that guess what follows these rows, from 1 on."""
        return tree.depths[rows] + self._prefix_len - self._anchor_len + 1

    def _detours_of(self, tree: DraftTree, row: int) -> int:
        node_id = int(tree.node_ids[row])
        if node_id not in self._detours:
            parent = int(tree.parents[row])
            num, parent_id = self._detours_of(tree, parent), int(tree.node_ids[parent])
            if parent_id not in self._firsts:  # its children are an older block's
                context, level = self._contexts[parent_id][None], self._levels(tree, np.array([parent]))
                token_ids, _ = self._source.language.draft(context, level, 1, np.array([num]))
                self._firsts[parent_id] = int(token_ids[0, 0])
            self._detours[node_id] = num + int(tree.token_ids[row] != self._firsts[parent_id])
        return self._detours[node_id]

    def _append(self, token_ids: Sequence[int]) -> None:
        positions = np.arange(self._prefix_len, self._prefix_len + len(token_ids))
        self._prefix = self._prefix + increments(np.array(token_ids, dtype=np.int64), positions).sum(axis=0)
        self._prefix_len += len(token_ids)
