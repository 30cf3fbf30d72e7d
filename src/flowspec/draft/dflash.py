"""Drafts with a DFlash or P-EAGLE head (arXiv 2602.06036, 2602.01469): one pass at a root, and a tree of its guesses.

A block guesses the tokens of each level whatever stands above them (arXiv 2604.12989 makes trees of such guesses), so
all nodes of a level have the same children, with the same log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from flowspec.draft.base import Accepted, ReusableDraft
from flowspec.draft.eagle import GREEDY
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Floats, Ints


class BlockCache(Protocol):
    """What a head keeps of a text."""

    @property
    def num_rows(self) -> int:
        """Tokens whose features have come."""
        ...

    def cut(self, num_rows: int, next_id: int) -> None:
        """Keep the first of them alone; ``next_id`` stands behind these now."""
        ...


AnyCache = TypeVar("AnyCache", bound=BlockCache)


class BlockHead(Protocol[AnyCache]):
    """A head that guesses blocks, as ``DFlashHead`` and ``PEagleHead``."""

    num_levels: int
    min_text: int

    def open_cache(self) -> AnyCache: ...

    def read(self, sums: Tensor, cache: AnyCache, next_ids: Sequence[int]) -> None: ...

    def guess(self, token_id: int, cache: AnyCache) -> Tensor: ...


class DFlashSource:
    """A loaded head, shared by all requests."""

    steady_steps = 1

    def __init__(
        self,
        head: BlockHead[Any],
        lm_head: LogitsHead,
        feature_layers: tuple[int, ...],
        is_coupled: bool = True,
        name: str = "dflash",
    ) -> None:
        """``is_coupled``: as ``EagleSource``."""
        self.name = name
        self.head = head
        self.lm_head = lm_head
        self.is_coupled = is_coupled
        self.feature_layers = feature_layers
        self.block_len = head.num_levels

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> DFlashDraft:
        return DFlashDraft(self, prompt_ids, sampler if self.is_coupled else GREEDY, top_k)


class DFlashDraft:
    """One request: the head's keys and values of the text before the root, and the newest block's guesses."""

    def __init__(self, source: DFlashSource, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> None:
        self._source = source
        self._prompt_ids = prompt_ids
        self._sampler = sampler
        self._top_k = top_k
        self._cache: BlockCache = source.head.open_cache()
        self._root_position = len(prompt_ids) - 1
        self._anchor_position = 0  # of the newest block
        self._token_ids: Ints = np.zeros((0, 0), dtype=np.int64)  # [levels, top_k]
        self._logprobs: Floats = np.zeros((0, 0))

    @property
    def num_certain(self) -> int:
        return self._cache.num_rows

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        assert isinstance(other, DFlashDraft) and num_cached <= other.num_certain, "guesses are not to be reused"
        self._cache = other._cache
        self._cache.cut(num_cached, self._prompt_ids[num_cached])

    def end(self) -> DFlashDraft:
        return self

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        assert not len(node_ids) or node_ids[0] == self._cache.num_rows, "the prompt comes in order"
        if len(node_ids):
            next_ids = self._prompt_ids[node_ids[0] + 1 : node_ids[-1] + 2]
            self._source.head.read(features, self._cache, next_ids)

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        next_ids = [*accepted.token_ids[1:], int(tree.token_ids[0])]
        self._source.head.read(accepted.features, self._cache, next_ids)
        self._root_position += len(accepted.node_ids)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """The root's pass cannot run before all of the prompt is verified."""
        if rows[0] == 0:
            if self._cache.num_rows < max(self._root_position, self._source.head.min_text):
                return False
            self._draft_block(int(tree.token_ids[0]))
        self._read_block(tree, rows)
        return True

    def reread(self, tree: DraftTree) -> None:
        self._read_block(tree, np.zeros(1, dtype=np.int64))

    def _draft_block(self, token_id: int) -> None:
        logits = self._source.lm_head.logits(self._source.head.guess(token_id, self._cache))
        positions = self._root_position + 1 + np.arange(len(logits))
        self._token_ids, self._logprobs = self._sampler.draft_children(logits, positions, self._top_k)
        self._anchor_position = self._root_position

    def _read_block(self, tree: DraftTree, rows: Ints) -> None:
        levels = tree.depths[rows] + self._root_position - self._anchor_position
        tree.expand(rows, self._token_ids[levels], self._logprobs[levels], levels + 1)
