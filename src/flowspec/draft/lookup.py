"""n-grams merged into another draft's tree: where the text has long repeated itself, it may go on doing so.

One look-up a commit: where the last eight tokens occurred before, what followed them then goes below the root as one
chain. How sure such tokens are is measured in the request itself, so on text that only seems to repeat itself they soon
lose to the draft's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from flowspec.draft.base import Accepted, BlockDraft, Draft, DraftSource, ReusableDraft
from flowspec.draft.ngram import NgramConfig, NgramDraft
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints

LONG = NgramConfig(min_match=8, max_match=8, num_tokens=16)
_HITS, _TRIALS = 4.0, 5.0  # as if seen before the first


class LookupSource:
    """Another source, and n-grams with it."""

    def __init__(self, inner: DraftSource) -> None:
        self._inner = inner
        self.name = inner.name
        self.steady_steps = inner.steady_steps
        self.block_len = inner.block_len
        self.feature_layers = inner.feature_layers

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> LookupDraft:
        return LookupDraft(self._inner.open(prompt_ids, sampler, top_k), prompt_ids)


class LookupDraft:
    """Another draft of a request, and n-grams with it."""

    def __init__(self, inner: Draft, prompt_ids: Sequence[int]) -> None:
        self._inner = inner
        self._ngrams = NgramDraft(LONG, prompt_ids)
        self._hits, self._trials = _HITS, _TRIALS
        self._chain: list[int] | None = None  # what may follow the root; ``None``: not looked up yet

    @property
    def num_certain(self) -> int:
        return self._inner.num_certain if isinstance(self._inner, ReusableDraft) else 0

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        assert isinstance(other, LookupDraft) and isinstance(self._inner, ReusableDraft)
        assert isinstance(other._inner, ReusableDraft)
        self._inner.reuse(other._inner, num_cached)

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        self._inner.read_prompt(node_ids, features)

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._inner.commit(accepted, tree)
        self._ngrams.commit(accepted, tree)
        self._count([*accepted.token_ids[1:], int(tree.token_ids[0])])
        self._chain = None

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """The other draft's pass; it may have overruled the chain, which is merged again."""
        if not self._inner.expand(tree, rows):
            return False
        if self._chain is None:
            self._chain = self._ngrams.look_up([int(tree.token_ids[0])])[1]
        if self._chain:
            tree.add_path(0, self._chain, [math.log(self._hits / self._trials)] * len(self._chain))
        return True

    def reread(self, tree: DraftTree) -> None:
        assert isinstance(self._inner, BlockDraft)
        self._inner.reread(tree)

    def _count(self, token_ids: Sequence[int]) -> None:
        """How far the chain went along with what came."""
        for guess, token_id in zip(self._chain or (), token_ids, strict=False):
            self._trials += 1
            if guess != token_id:
                break
            self._hits += 1
