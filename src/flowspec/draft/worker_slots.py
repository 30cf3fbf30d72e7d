"""Who holds how many slots of a draft worker's caches: requests that draft there, and the caches of ended ones.

A cache is counted as the worker takes memory for it, so no request takes what is not there. Knows no messages.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from flowspec.model.slots import INITIAL_CAPACITY

logger = logging.getLogger("flowspec.draft")

AHEAD = 0.25  # that a request holds more than it needs, of that, where there are some: a cache is copied to grow


class WorkerSlots:
    def __init__(
        self, num_slots: int | None = None, most: int = sys.maxsize, forget_oldest: Callable[[], None] = lambda: None
    ) -> None:
        """``num_slots``: that there is memory for; ``None``: nobody counts. ``most``: that a request may have.

        ``forget_oldest``: ends in a ``release`` of what was kept first, once or at last.
        """
        self.num_slots = num_slots
        self._most = most
        self._forget_oldest = forget_oldest
        self._held: dict[int, int] = {}  # by requests that draft
        self._kept: dict[int, int] = {}  # by ended ones, whose caches are for later
        self.num_refused = 0  # requests that there was nothing left for

    @property
    def num_held(self) -> int:
        """By requests that draft."""
        return sum(self._held.values())

    @property
    def num_kept(self) -> int:
        """By the caches of ended ones."""
        return sum(self._kept.values())

    def held_by(self, request_id: int) -> int:
        return self._held.get(request_id, 0)

    def grow(self, request_id: int, needed: int) -> bool:
        """Let a request hold as many as it needs, and more where some are free; False where there are not so many.

        What is kept of ended requests makes room for what is needed, the oldest first.
        """
        wanted = min(self._most, round((1 + AHEAD) * needed))
        needed = max(needed, INITIAL_CAPACITY)  # no cache is smaller
        if self.num_slots is None:
            self._held[request_id] = max(needed, wanted)
            return True
        left = self.num_slots - (self.num_held - self.held_by(request_id))
        if needed > left:
            self._refuse(request_id, needed)
            return False
        self._held[request_id] = max(needed, min(wanted, left - self.num_kept))
        while self.num_held + self.num_kept > self.num_slots:
            self._forget_oldest()
        return True

    def _refuse(self, request_id: int, needed: int) -> None:
        """The first time is for whoever runs this; later ones are the same again."""
        num_others = len(self._held.keys() - {request_id})
        self.num_refused += 1
        logger.log(
            logging.WARNING if self.num_refused == 1 else logging.DEBUG,
            "n-grams draft for a request: the draft worker has memory for the keys and values of %s tokens; %s of them "
            "are held by %d others, and it needs %s. Give that worker more memory (--max-memory), or let fewer "
            "requests run at once; of later ones nothing is said",
            f"{self.num_slots:,}", f"{self.num_held - self.held_by(request_id):,}", num_others, f"{needed:,}",
        )  # fmt: skip

    def keep(self, request_id: int) -> None:
        """The request has ended, and its cache is for later."""
        self._kept[request_id] = self._held.pop(request_id)

    def take_over(self, kept_by: int, request_id: int) -> None:
        """A new request goes on with what was kept of an ended one; a cache never gets smaller."""
        self._held[request_id] = self._kept.pop(kept_by)

    def release(self, request_id: int) -> None:
        """Whatever there was is gone."""
        self._held.pop(request_id, None)
        self._kept.pop(request_id, None)
