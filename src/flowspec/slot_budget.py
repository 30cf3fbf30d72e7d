"""Who holds how many of the workers' slots, and what ended requests have left there for heirs. Knows no messages.

Slots are counted as on the worker that has room for fewest tokens. A request is charged for all that it may ever need
before it starts, so a worker never runs out of memory half-way.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowspec.generation import Heritage, Left

MIN_KEPT = 16  # tokens; fewer are not worth the cache that they would take apart
MAX_LEFT = 8  # ended requests that leave something, at most


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

    def is_held(self, request_id: int) -> bool:
        return request_id in self._held

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
