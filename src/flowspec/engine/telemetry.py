"""What the workers' results say of the workers: how busy they are, and what reached them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowspec.cluster.trips import Trip
from flowspec.engine.pipeline import Pipeline
from flowspec.wire.messages import Timing

StageState: TypeAlias = Literal["up", "loading", "away"]
DraftState: TypeAlias = Literal["up", "away", "off"]  # off: its guesses were of no use


@dataclass(frozen=True)
class StageStatus:
    """One stage and its worker, now."""

    stage: int  # from 1
    layers: str  # as ``4:8``
    address: str | None  # ``None`` in process
    device: str  # for people
    weight_bytes: int | None  # ``None``: its worker did not say
    peak_memory_bytes: int | None  # while it loaded
    load_s: float | None  # until it was ready
    fetched_bytes: int | None  # of weights, that came from here meanwhile
    busy_s: float  # of forwards whose results came back
    link_bytes: int  # that it has received on the data path
    trip: Trip | None  # the newest known round trip to it
    state: StageState = "up"


@dataclass(frozen=True)
class DraftWorkerStatus:
    """The worker that a small model as draft runs on, now."""

    address: str
    state: DraftState
    link_bytes: int  # that have gone to it and come back
    num_slots: int | None  # rows that its caches have room for; ``None``: unknown
    num_slots_held: int  # by requests that draft there

    @property
    def kv_usage(self) -> float:
        """As of ``Status``; 0 where nobody counts."""
        return self.num_slots_held / self.num_slots if self.num_slots else 0.0


@dataclass(frozen=True)
class Status:
    """An engine, now."""

    num_running: int  # requests
    num_waiting: int
    num_slots: int | None  # rows that the workers' KV caches have room for; ``None``: unknown
    num_slots_held: int  # by running requests
    stalled_s: float  # for how long no worker has said anything of the work that is under way
    stages: tuple[StageStatus, ...]
    problem: str | None = None  # why nothing moves at the moment, though it will go on
    num_recoveries: int = 0  # times that the pipeline was lost and came back
    draft_worker: DraftWorkerStatus | None = None  # ``None``: there is none

    @property
    def kv_usage(self) -> float | None:
        """Share of the rows in the KV caches that running requests hold."""
        return self.num_slots_held / self.num_slots if self.num_slots else None


class Telemetry:
    """Totals by stage since the engine began. Written by the engine's thread, read by any."""

    def __init__(self, num_stages: int) -> None:
        self._busy_s = [0.0] * num_stages
        self._link_bytes = [0] * num_stages
        self._bytes_before = [0] * num_stages  # of earlier sessions
        self._newest_s = [0.0] * num_stages  # start of the newest forward that was counted
        self._bytes_gone = 0  # between workers of which some are gone

    def note(self, timings: Sequence[Timing]) -> None:
        """The forwards of a segment that came back."""
        for timing in timings:
            index = timing.stage - 1
            self._link_bytes[index] = self._bytes_before[index] + timing.link_bytes
            if timing.start_s > self._newest_s[index]:  # requests that shared a forward count once
                self._newest_s[index] = timing.start_s
                self._busy_s[index] += timing.end_s - timing.start_s

    def begin_session(self, num_stages: int) -> None:
        """Workers begin to count again, maybe on other clocks; where there are fewer, they are others."""
        if num_stages != len(self._busy_s):
            self._bytes_gone += sum(self._link_bytes[1:])
            self._busy_s, self._link_bytes = [0.0] * num_stages, [0] * num_stages
        self._bytes_before = list(self._link_bytes)
        self._newest_s = [-math.inf] * num_stages

    def stages(self, pipeline: Pipeline, state_of: Callable[[int], StageState]) -> tuple[StageStatus, ...]:
        """All of a pipeline. Any thread may ask."""
        trips = pipeline.connections.trips
        ready = pipeline.ready or [None] * len(pipeline.partition)
        return tuple(
            StageStatus(
                stage,
                str(layers),
                pipeline.addresses[stage - 1] if pipeline.addresses else None,
                pipeline.spec.names[stage - 1] if pipeline.spec.names else f"worker {stage}",
                said.weight_bytes if said is not None else None,
                said.peak_memory_bytes if said is not None else None,
                said.load_s if said is not None else None,
                said.fetched_bytes if said is not None else None,
                self.busy_s(stage),
                self.link_bytes(stage),
                trips.get(stage),
                state_of(stage),
            )
            for stage, (layers, said) in enumerate(zip(pipeline.partition.stages, ready, strict=True), start=1)
        )

    def busy_s(self, stage: int) -> float:
        """Of forwards whose results came back."""
        return self._busy_s[stage - 1]

    def link_bytes(self, stage: int) -> int:
        """Received by the stage's worker on the data path."""
        return self._link_bytes[stage - 1]

    @property
    def bytes_between(self) -> int:
        """On the links between workers; what reaches the first one the driver counts itself."""
        return self._bytes_gone + sum(self._link_bytes[1:])
