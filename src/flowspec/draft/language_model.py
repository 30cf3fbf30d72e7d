"""Drafts with a small language model: it needs nothing of the target but its tokens, and runs ahead as far as it likes.

All of its layers are one stage, as a worker would run it. A node's row is written once, into a slot of the request's
own cache, and is right for as long as the node lives: its keys and values hang on its path alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from flowspec.draft.base import Accepted, ReusableDraft
from flowspec.draft.eagle import GREEDY
from flowspec.draft.token_map import TokenMap
from flowspec.model.stage import Stage, StageCache, forward
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Floats, Ints
from flowspec.wire.messages import NO_PARENT

STEADY_STEPS = 16  # its guesses hardly get worse with depth, and nothing makes them better
MAX_KEPT = 2  # ended requests whose caches stay: they are as deep as the model, and the driver's memory is small
CHUNK = 64  # tokens of a prompt that are read in one pass: results do not wait for all of it


class ModelSource:
    """A loaded model, shared by all requests."""

    name = "model"
    steady_steps = STEADY_STEPS
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(
        self, stage: Stage, head: LogitsHead, tokens: TokenMap, max_positions: int, is_coupled: bool = True
    ) -> None:
        """``stage``: all layers of the model; ``head``: its lm_head. ``is_coupled``: as in ``EagleSource``."""
        self.stage = stage
        self.head = head
        self.tokens = tokens
        self.max_positions = max_positions
        self.is_coupled = is_coupled
        self._kept: deque[ModelDraft] = deque()  # of ended requests, with their caches

    def keep(self, draft: ModelDraft) -> None:
        """An ended one; of those before it only a few stay of use."""
        self._kept.append(draft)
        if len(self._kept) > MAX_KEPT:
            self._kept.popleft().forget()

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> ModelDraft:
        return ModelDraft(self, prompt_ids, sampler if self.is_coupled else GREEDY, top_k)


class ModelDraft:
    """One request. Positions are the draft's own: a token of the target may be several of its tokens."""

    def __init__(self, source: ModelSource, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> None:
        self._source = source
        self._sampler = sampler
        self._top_k = top_k
        self._cache: StageCache = source.stage.open_cache(root_id=len(prompt_ids) - 1)
        self._ends: list[int] = []  # by token of the prefix: how many of the draft's tokens end with it
        self._waiting: list[int] = []  # the draft's tokens of the prefix that are not in the cache yet
        self._num_prefix = 0  # those that are
        self._waiting = self._add_to_prefix(prompt_ids[:-1])
        self._root_position = len(prompt_ids) - 1  # the target's
        self._guesses: dict[int, tuple[Ints, Floats]] = {}  # by node id: tokens and log-probabilities [k]

    def _add_to_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """As the draft reads them."""
        own_ids: list[int] = []
        start = self._ends[-1] if self._ends else 0
        for token_id in token_ids:
            own_ids += self._source.tokens.read(token_id)
            self._ends.append(start + len(own_ids))
        return own_ids

    @property
    def num_certain(self) -> int:
        return bisect_right(self._ends, self._num_prefix)

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        """Of what the other one has read, as much as it still has."""
        assert isinstance(other, ModelDraft)
        num_tokens = min(num_cached, other.num_certain)
        if not num_tokens:
            return
        self._cache, self._num_prefix = other._cache, other._ends[num_tokens - 1]
        self._cache.slots.reuse(self._num_prefix, self._root_position)
        self._waiting = self._waiting[self._num_prefix :]

    def end(self) -> ModelDraft:
        self._cache.slots.finish([])
        self._guesses.clear()
        self._source.keep(self)
        return self

    def forget(self) -> None:
        """There is nothing to take over any more."""
        self._cache, self._num_prefix, self._ends = self._source.stage.open_cache(), 0, []

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """The prompt is known; it is read when the first pass is wanted."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        """What the cache has of the accepted path stays there; the rest is read with the new root."""
        table = self._cache.slots
        known = list(takewhile(lambda node_id: table.slot_of(node_id) is not None, accepted.node_ids))
        table.commit(known, tree.root_id)
        self._add_to_prefix(accepted.token_ids[: len(known)])
        self._num_prefix += len(known)
        self._waiting += self._add_to_prefix(accepted.token_ids[len(known) :])
        self._root_position += len(accepted.node_ids)
        alive = set(tree.node_ids.tolist())
        self._guesses = {node_id: guesses for node_id, guesses in self._guesses.items() if node_id in alive}

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """A pass over the nodes that were not run yet, or over the next part of a long prompt, which guesses nothing.

        Nodes that it cannot read as one token, or that stand below such, get no children.
        """
        ids = tree.node_ids[rows].tolist()
        if rows[0] == 0 and ids[0] not in self._guesses and not self._run_root(tree):
            return True
        self._run_nodes(tree, np.array([row for row, i in zip(rows, ids, strict=True) if i not in self._guesses], int))
        tree.staleness[rows] = 0  # there is nothing fresher to learn about them
        known = [(row, *self._guesses[i]) for row, i in zip(rows, ids, strict=True) if i in self._guesses]
        if known:
            known_rows, token_ids, logprobs = (np.stack(column) for column in zip(*known, strict=True))
            tree.expand(known_rows, token_ids, logprobs, np.zeros(len(known), dtype=np.int64))
        return True

    def _run_root(self, tree: DraftTree) -> bool:
        """Read what there is before the root, and the root; whether all of it has been read."""
        table = self._cache.slots
        *before, root = [*self._waiting, *self._source.tokens.read(int(tree.token_ids[0]))]
        num_read = min(len(before), CHUNK) if len(self._waiting) > CHUNK else len(before)
        positions = np.arange(self._num_prefix, self._num_prefix + num_read)
        if num_read + self._num_prefix >= self._source.max_positions:
            tree.staleness[0] = 0  # the text is longer than this model can read
            return False
        slots = table.append_prefix(positions)
        self._num_prefix += num_read
        if num_read < len(before):
            self._waiting = self._waiting[num_read:]
            self._forward(before[:num_read], slots)
            return False
        self._waiting = []
        _, own = table.place([tree.root_id], [NO_PARENT], [self._num_prefix])
        hidden = self._forward([*before, root], np.concatenate([slots, own]))
        self._guess([tree.root_id], hidden[-1:], np.zeros(1, dtype=np.int64))
        return True

    def _run_nodes(self, tree: DraftTree, rows: Ints) -> None:
        """The rows' parents are in the cache, or else they stay as they are."""
        table = self._cache.slots
        parent_ids = tree.node_ids[tree.parents[rows]]
        read = [self._source.tokens.read(token_id) for token_id in tree.token_ids[rows].tolist()]
        deepest = self._source.max_positions - self._num_prefix - 1
        is_of_use = np.array(
            [
                row > 0 and len(own_ids) == 1 and depth <= deepest and table.slot_of(parent_id) is not None
                for row, own_ids, depth, parent_id in zip(
                    rows.tolist(), read, tree.depths[rows].tolist(), parent_ids.tolist(), strict=True
                )
            ],
            dtype=np.bool_,
        )
        if not is_of_use.any():
            return
        rows = rows[is_of_use]
        node_ids = tree.node_ids[rows]
        own_ids = [ids[0] for ids, is_good in zip(read, is_of_use, strict=True) if is_good]
        _, slots = table.place(node_ids, parent_ids[is_of_use], self._num_prefix + tree.depths[rows])
        self._guess(node_ids.tolist(), self._forward(own_ids, slots), tree.depths[rows])

    def _forward(self, own_ids: list[int], slots: Ints) -> Tensor:
        """[n, H]."""
        return forward(self._source.stage, torch.tensor(own_ids), slots, self._cache)

    def _guess(self, node_ids: list[int], hidden: Tensor, depths: Ints) -> None:
        """What may follow each of the nodes, by their hidden states [n, H]."""
        logits = self._source.tokens.logits(self._source.head.logits(hidden))
        positions = depths + self._root_position + 1
        token_ids, logprobs = self._sampler.draft_children(logits, positions, self._top_k)
        self._guesses.update(zip(node_ids, zip(token_ids, logprobs, strict=True), strict=True))
