"""What the workers' results say of the workers: how busy they are, and what reached them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowspec.cluster.connections import Trip
from flowspec.wire.messages import Timing


@dataclass(frozen=True)
class StageStatus:
    """One stage and its worker, now."""

    stage: int  # from 1
    layers: str  # as ``4:8``
    address: str | None  # ``None`` in process
    weight_bytes: int | None  # ``None``: its worker did not say
    peak_memory_bytes: int | None  # while it loaded
    busy_s: float  # of forwards whose results came back
    link_bytes: int  # that it has received on the data path
    trip: Trip | None  # the newest known round trip to it


@dataclass(frozen=True)
class Status:
    """An engine, now."""

    num_running: int  # requests
    num_waiting: int
    num_slots: int | None  # rows that the workers' KV caches have room for; ``None``: unknown
    num_slots_held: int  # by running requests
    stalled_s: float  # for how long no worker has said anything of the work that is under way
    stages: tuple[StageStatus, ...]

    @property
    def kv_usage(self) -> float | None:
        """Share of the rows in the KV caches that running requests hold."""
        return self.num_slots_held / self.num_slots if self.num_slots else None


class Telemetry:
    """Totals by stage since the engine began. Written by the engine's thread, read by any."""

    def __init__(self, num_stages: int) -> None:
        self._busy_s = [0.0] * num_stages
        self._link_bytes = [0] * num_stages
        self._newest_s = [0.0] * num_stages  # start of the newest forward that was counted

    def note(self, timings: Sequence[Timing]) -> None:
        """The forwards of a segment that came back."""
        for timing in timings:
            index = timing.stage - 1
            self._link_bytes[index] = timing.link_bytes
            if timing.start_s > self._newest_s[index]:  # requests that shared a forward count once
                self._newest_s[index] = timing.start_s
                self._busy_s[index] += timing.end_s - timing.start_s

    def busy_s(self, stage: int) -> float:
        """Of forwards whose results came back."""
        return self._busy_s[stage - 1]

    def link_bytes(self, stage: int) -> int:
        """Received by the stage's worker on the data path."""
        return self._link_bytes[stage - 1]

    @property
    def bytes_between(self) -> int:
        """On the links between workers; what reaches the first one the driver counts itself."""
        return sum(self._link_bytes[1:])
