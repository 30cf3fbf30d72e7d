"""Round trips to the workers, on the connections that the driver has to them, and what their clocks show."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

_NUM_TRIPS = 8


@dataclass(frozen=True)
class Trip:
    """A round trip on a control connection; a worker answers between two pieces of its work."""

    round_trip_s: float
    clock_offset_s: float  # the driver's clock less the worker's, at most half a round trip off

    @property
    def to_driver_s(self) -> float:
        """What makes a time on the worker's clock one on the driver's.

        Within half a round trip nobody can tell the two apart, and local processes share one: 0 then.
        """
        return self.clock_offset_s if abs(self.clock_offset_s) > self.round_trip_s / 2 else 0.0


class Trips:
    """Of one session."""

    def __init__(self) -> None:
        self._sent_s: float | None = None
        self._by_stage: dict[int, deque[Trip]] = {}

    def begin(self) -> None:
        """All workers are asked now."""
        self._sent_s = time.perf_counter()

    def note(self, stage: int, clock_s: float) -> None:
        """Its answer has come, made at this time of its own."""
        if self._sent_s is not None:
            now = time.perf_counter()
            trip = Trip(now - self._sent_s, (now + self._sent_s) / 2 - clock_s)
            self._by_stage.setdefault(stage, deque(maxlen=_NUM_TRIPS)).append(trip)

    @property
    def shortest(self) -> Mapping[int, Trip]:
        """Of the last few, by stage: it waited least for the worker's own work. Any thread may ask."""
        known = [(stage, list(trips)) for stage, trips in list(self._by_stage.items())]
        return {stage: min(trips, key=lambda trip: trip.round_trip_s) for stage, trips in known}
