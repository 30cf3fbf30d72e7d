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
        self.steady_steps = steady_steps(language.hit_rates())

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
        self._append(prompt_ids[:-1])

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """The prompt was read when the draft was opened."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._append(accepted.token_ids)
        alive = set(tree.node_ids.tolist())
        self._contexts = {node_id: context for node_id, context in self._contexts.items() if node_id in alive}

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        parents = tree.parents[rows]
        above = [self._prefix if row < 0 else self._contexts[int(tree.node_ids[row])] for row in parents.tolist()]
        contexts = np.stack(above) + increments(tree.token_ids[rows], tree.depths[rows] + self._prefix_len)
        self._contexts.update(zip(tree.node_ids[rows].tolist(), contexts, strict=True))
        staleness = np.where(parents < 0, 0, tree.staleness[parents]) + 1
        tree.expand(rows, *self._source.language.draft(contexts, staleness, self._top_k), staleness)
        return True

    def _append(self, token_ids: Sequence[int]) -> None:
        positions = np.arange(self._prefix_len, self._prefix_len + len(token_ids))
        self._prefix = self._prefix + increments(np.array(token_ids, dtype=np.int64), positions).sum(axis=0)
        self._prefix_len += len(token_ids)
