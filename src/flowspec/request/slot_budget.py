"""Who holds how many of the workers' slots, and what ended requests have left there for heirs. Knows no messages.

Slots are counted as on the worker that has room for fewest tokens. A request holds what it needs for some time ahead,
and takes more before it needs more, so no worker ever runs out of memory. Who has to go when there is no more is not
decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowspec.draft.base import HeritableDraft

MIN_KEPT = 16  # tokens; fewer are not worth the cache that they would take apart
MAX_LEFT = 8  # ended requests that leave something, at most


def slots_needed(num_tokens: int, tree_size: int) -> int:
    """By a text of so many tokens, with its tree: twice that, since the dead leave with a delay."""
    return num_tokens + 2 * tree_size


@dataclass(frozen=True)
class Heritage:
    """The beginning of a prompt, as an earlier request has computed it; by default nothing."""

    request_id: int | None = None
    num_kept: int = 0  # tokens
    draft: HeritableDraft | None = None


@dataclass(frozen=True)
class Left:
    """What an ended request has left at the workers, and in the driver."""

    request_id: int
    token_ids: tuple[int, ...]  # whose keys and values the workers hold
    draft: HeritableDraft | None  # one that needed features, if it can hand on what it made of them

    def heritage(self, prompt_ids: Sequence[int], needs_features: bool) -> Heritage:
        """What a request with this prompt can take over."""
        if needs_features and self.draft is None:
            return Heritage()
        pairs = enumerate(zip(self.token_ids, prompt_ids, strict=False))
        num_common = next(
            (i for i, (ours, theirs) in pairs if ours != theirs), min(len(self.token_ids), len(prompt_ids))
        )
        # The root runs again, and one token before it: the features of the last tokens of the prompt must come back.
        num_kept = min(num_common - 1, len(prompt_ids) - 2)
        if needs_features and self.draft is not None:
            num_kept = min(num_kept, self.draft.num_settled)
        return Heritage(self.request_id, num_kept, self.draft) if num_kept > 0 else Heritage()


class SlotBudget:
    def __init__(self, num_slots: int | None) -> None:
        """``num_slots``: of all requests together; ``None``: as many as they like."""
        self.num_slots = num_slots
        self._held: dict[int, int] = {}  # by running request
        self._left: dict[int, tuple[Left, int]] = {}  # by ended request, the longest unused first

    @property
    def num_held(self) -> int:
        """By running requests."""
        return sum(self._held.values())

    @property
    def num_left(self) -> int:
        """By what ended requests have left."""
        return sum(num_slots for _, num_slots in self._left.values())

    def held_by(self, request_id: int) -> int:
        """0 for a request that is not running."""
        return self._held.get(request_id, 0)

    def has_room(self, num_slots: int) -> bool:
        """Whether a request may start now that needs so many."""
        return self.num_slots is None or self.num_held + num_slots <= self.num_slots

    def take(
        self, request_id: int, num_slots: int, prompt_ids: Sequence[int], needs_features: bool
    ) -> tuple[Heritage, list[int]]:
        """Start a request: what it inherits, and whose leavings have to go to make room for it."""
        assert self.has_room(num_slots), "ask has_room first"
        # An heir's cache has at least the capacity that it had before.
        fitting = [left for left, num_before in self._left.values() if self.has_room(max(num_slots, num_before))]
        heritages = [left.heritage(prompt_ids, needs_features) for left in fitting]
        heritage = max(heritages, key=lambda heritage: heritage.num_kept, default=Heritage())
        if heritage.num_kept < MIN_KEPT:
            heritage = Heritage()
        elif heritage.request_id is not None:
            num_slots = max(num_slots, self._left.pop(heritage.request_id)[1])
        self._held[request_id] = num_slots
        return heritage, self._make_room()

    def can_grow(self, request_id: int, num_slots: int) -> bool:
        """Whether a running request may hold so many in all."""
        return self.has_room(num_slots - self._held[request_id])

    def grow(self, request_id: int, num_slots: int) -> list[int]:
        """Let a running request hold so many in all; returns whose leavings have to go."""
        assert self.can_grow(request_id, num_slots), "ask can_grow first"
        self._held[request_id] = num_slots
        return self._make_room()

    def end(self, request_id: int, left: Left | None) -> list[int]:
        """A request has ended; returns whose leavings have to go."""
        num_slots = self._held.pop(request_id)
        if left is not None:
            self._left[request_id] = left, num_slots
        return self._make_room()

    def _make_room(self) -> list[int]:
        gone: list[int] = []
        while self._left and (
            len(self._left) > MAX_LEFT
            or (self.num_slots is not None and self.num_held + self.num_left > self.num_slots)
        ):
            gone.append(next(iter(self._left)))
            del self._left[gone[-1]]
        return gone
