"""n-grams merged into another draft's tree: where text has long repeated itself, or an earlier one, it may go on so.

One look-up a commit: where the last eight tokens occurred before, what followed them then goes below the root. How sure
such tokens are is measured in the request itself, so on text that only seems to repeat itself they soon lose to the
draft's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flowspec.draft.base import Accepted, ApartDraft, BlockDraft, Draft, DraftSource, ReusableDraft
from flowspec.draft.memory import Memory
from flowspec.draft.ngram import Guesses, LookBack, NgramConfig
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints

LONG = NgramConfig(widths=(8,), min_foreign=8, depth=16)
_HITS, _TRIALS = 4.0, 5.0  # as if seen before the first


class LookupSource:
    """Another source, and n-grams with it, of the request's own text and of ``memory``."""

    def __init__(self, inner: DraftSource, memory: Memory | None = None) -> None:
        self._inner = inner
        self._memory = memory
        self.name = inner.name
        self.steady_steps = inner.steady_steps
        self.block_len = inner.block_len
        self.feature_layers = inner.feature_layers

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> LookupDraft:
        inner = self._inner.open(prompt_ids, sampler, top_k)
        return LookupDraft(inner, LookBack(LONG, prompt_ids[:-1], self._memory))


class LookupDraft:
    """Another draft of a request, and n-grams with it."""

    def __init__(self, inner: Draft, text: LookBack) -> None:
        self._inner = inner
        self._apart = inner if isinstance(inner, ApartDraft) else None
        self._text = text
        self._hits, self._trials = _HITS, _TRIALS
        self._guesses: Guesses | None = None  # of what may follow the root; ``None``: not looked up yet

    @property
    def num_certain(self) -> int:
        return self._inner.num_certain if isinstance(self._inner, ReusableDraft) else 0

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        if isinstance(self._inner, ReusableDraft):  # else the draft was another one by then
            self._inner.reuse(other, num_cached)

    def end(self) -> ReusableDraft | None:
        """n-grams are read anew from the text."""
        return self._inner.end() if isinstance(self._inner, ReusableDraft) else None

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        self._inner.read_prompt(node_ids, features)

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._inner.commit(accepted, tree)
        self._text.append(accepted.token_ids)
        self._count([*accepted.token_ids[1:], int(tree.token_ids[0])])
        self._guesses = None

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """The other draft's pass; it may have overruled the guesses, which are merged again."""
        if not self._inner.expand(tree, rows):
            return False
        self._graft(tree)
        return True

    def _graft(self, tree: DraftTree) -> None:
        if self._guesses is None:
            self._guesses = self._text.look_up([int(tree.token_ids[0])])
        if self._guesses.token_ids:
            self._guesses.graft(tree, 0, self._hits / self._trials)

    @property
    def pass_s(self) -> float:
        return 0.0 if self._apart is None else self._apart.pass_s

    def go_apart(self) -> None:
        if self._apart is not None:
            self._apart.go_apart()

    def settle(self, tree: DraftTree) -> bool:
        if self._apart is None:
            return True
        num_before = len(tree)
        is_settled = self._apart.settle(tree)
        if len(tree) > num_before:
            self._graft(tree)
        return is_settled

    def close(self) -> None:
        if self._apart is not None:
            self._apart.close()

    def reread(self, tree: DraftTree) -> None:
        assert isinstance(self._inner, BlockDraft)
        self._inner.reread(tree)

    def _count(self, token_ids: Sequence[int]) -> None:
        """How far the guesses went along with what came: at each step one of them was right, or none."""
        if self._guesses is None:
            return
        place, children = -1, self._guesses.children()
        for token_id in token_ids:
            if place not in children:
                break
            self._trials += 1
            if token_id not in children[place]:
                break
            self._hits += 1
            place = children[place][token_id]
