"""Who holds how many of the workers' slots: running requests, and the prefix cache of ended ones. Knows no messages.

Slots are counted as on the worker that has room for fewest tokens. A request holds what it needs for some time ahead,
and takes more before it needs more, so no worker ever runs out of memory. Who has to go when there is no more is not
decided here.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowspec.request.prefix_cache import CachedPrefix, CacheEntry

MIN_CACHED = 16  # tokens; fewer are not worth the cache that they would take apart
MAX_ENTRIES = 8  # ended requests whose caches stay, at most


def slots_needed(num_tokens: int, tree_size: int) -> int:
    """By a text of so many tokens, with its tree: twice that, since the dead leave with a delay."""
    return num_tokens + 2 * tree_size


class SlotBudget:
    def __init__(self, num_slots: int | None) -> None:
        """``num_slots``: of all requests together; ``None``: as many as they like."""
        self.num_slots = num_slots
        self._held: dict[int, int] = {}  # by running request
        self._entries: dict[int, tuple[CacheEntry, int]] = {}  # by ended request, the longest unused first

    @property
    def num_held(self) -> int:
        """By running requests."""
        return sum(self._held.values())

    @property
    def num_cached(self) -> int:
        """By the caches of ended requests."""
        return sum(num_slots for _, num_slots in self._entries.values())

    def held_by(self, request_id: int) -> int:
        """0 for a request that is not running."""
        return self._held.get(request_id, 0)

    def has_room(self, num_slots: int) -> bool:
        """Whether a request may start now that needs so many."""
        return self.num_slots is None or self.num_held + num_slots <= self.num_slots

    def take(
        self, request_id: int, num_slots: int, prompt_ids: Sequence[int], needs_features: bool
    ) -> tuple[CachedPrefix, list[int]]:
        """Start a request: what is cached of its prompt, and whose cache entries have to go to make room for it."""
        assert self.has_room(num_slots), "ask has_room first"
        # A cache that is taken over has at least the capacity that it had before.
        fitting = [entry for entry, num_before in self._entries.values() if self.has_room(max(num_slots, num_before))]
        prefixes = [entry.prefix_for(prompt_ids, needs_features) for entry in fitting]
        cached = max(prefixes, key=lambda cached: cached.num_cached, default=CachedPrefix())
        if cached.num_cached < MIN_CACHED:
            cached = CachedPrefix()
        elif cached.request_id is not None:
            num_slots = max(num_slots, self._entries.pop(cached.request_id)[1])
        self._held[request_id] = num_slots
        return cached, self._make_room()

    def can_grow(self, request_id: int, num_slots: int) -> bool:
        """Whether a running request may hold so many in all."""
        return self.has_room(num_slots - self._held[request_id])

    def grow(self, request_id: int, num_slots: int) -> list[int]:
        """Let a running request hold so many in all; returns whose cache entries have to go."""
        assert self.can_grow(request_id, num_slots), "ask can_grow first"
        self._held[request_id] = num_slots
        return self._make_room()

    def end(self, request_id: int, entry: CacheEntry | None) -> list[int]:
        """A request has ended; returns whose cache entries have to go."""
        num_slots = self._held.pop(request_id)
        if entry is not None:
            self._entries[request_id] = entry, num_slots
        return self._make_room()

    def _make_room(self) -> list[int]:
        gone: list[int] = []
        while self._entries and (
            len(self._entries) > MAX_ENTRIES
            or (self.num_slots is not None and self.num_held + self.num_cached > self.num_slots)
        ):
            gone.append(next(iter(self._entries)))
            del self._entries[gone[-1]]
        return gone
