"""Drafts with a DFlash head (arXiv 2602.06036): one pass at a root, and a tree from its guesses, as DDTree grows it.

A block guesses the tokens of each level whatever stands above them (arXiv 2604.12989 makes trees of such guesses), so
all nodes of a level have the same children, with the same log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flowspec.draft.base import Accepted, ReusableDraft
from flowspec.draft.eagle import GREEDY
from flowspec.model.dflash_head import DFlashHead
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Floats, Ints


class DFlashSource:
    """A loaded head, shared by all requests."""

    name = "dflash"
    steady_steps = 1

    def __init__(
        self, head: DFlashHead, lm_head: LogitsHead, feature_layers: tuple[int, ...], is_coupled: bool = True
    ) -> None:
        """``is_coupled``: as ``EagleSource``."""
        self.head = head
        self.lm_head = lm_head
        self.is_coupled = is_coupled
        self.feature_layers = feature_layers
        self.block_len = head.num_levels

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> DFlashDraft:
        return DFlashDraft(self, len(prompt_ids), sampler if self.is_coupled else GREEDY, top_k)


class DFlashDraft:
    """One request: the head's keys and values of the text before the root, and the newest block's guesses."""

    def __init__(self, source: DFlashSource, prompt_len: int, sampler: Sampler, top_k: int) -> None:
        self._source = source
        self._sampler = sampler
        self._top_k = top_k
        self._cache = source.head.open_cache()
        self._root_position = prompt_len - 1
        self._anchor_position = 0  # of the newest block
        self._token_ids: Ints = np.zeros((0, 0), dtype=np.int64)  # [levels, top_k]
        self._logprobs: Floats = np.zeros((0, 0))

    @property
    def num_certain(self) -> int:
        return self._cache.num_rows

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        assert isinstance(other, DFlashDraft) and num_cached <= other.num_certain, "guesses are not to be reused"
        self._cache = other._cache
        self._cache.num_rows = num_cached

    def end(self) -> DFlashDraft:
        return self

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        assert not len(node_ids) or node_ids[0] == self._cache.num_rows, "the prompt comes in order"
        self._source.head.read(features, self._cache)

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._source.head.read(accepted.features, self._cache)
        self._root_position += len(accepted.node_ids)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """The root's pass cannot run before all of the prompt is verified."""
        if rows[0] == 0:
            if self._cache.num_rows < self._root_position:
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
