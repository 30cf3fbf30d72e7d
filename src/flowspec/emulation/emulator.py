"""An emulated cluster of real processes and sockets on this machine: every worker is as slow as its device would be.

The same actors, costs and links as in the simulator, but each place in a process of its own, paced by the wall clock.
It shows that the simulator's figures hold where messages really travel and processes really wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from types import TracebackType

import torch

from flowspec.cluster.connections import RemoteConnections
from flowspec.cluster.local import LocalProcesses
from flowspec.config import LinkConfig
from flowspec.emulation.checkpoint_pair import CheckpointPair
from flowspec.emulation.experiment import TENSOR_PARALLEL, Experiment, make_driver
from flowspec.emulation.paced import PacedActor, WallClock
from flowspec.emulation.start_up import Informed
from flowspec.emulation.virtual_time import Clock, Sizes, VirtualLink
from flowspec.errors import UsageError, WorkerError
from flowspec.model.demo_pair import draft_for_workers
from flowspec.request.emissions import Emissions
from flowspec.request.records import RequestRecord, forward_spans
from flowspec.request.request import Request
from flowspec.schedule.catalogue import flow_parts
from flowspec.schedule.pace import Pace
from flowspec.wire.actor import Route
from flowspec.wire.messages import Emulation, Hint, Result, Stamped

_LONGEST_WAIT_S = 0.2


@dataclass(frozen=True)
class Emulated:
    """What an emulated run gave."""

    records: list[RequestRecord]
    max_lag_s: float  # of the wall clock behind virtual time, anywhere, in virtual seconds


class Emulator:
    """Worker processes that play a cluster's devices; a context manager.

    Raises ``UsageError`` for a model that has too few layers, ``WorkerError`` when a worker fails.
    """

    def __init__(
        self,
        experiment: Experiment,
        cluster_text: str,
        schedule: str,
        pair: CheckpointPair,
        time_scale: float,
    ) -> None:
        """``cluster_text``: the text of the file that ``experiment.cluster`` was read from."""
        if schedule in TENSOR_PARALLEL:
            raise UsageError(f"{schedule} is a cost model; it runs in the simulator only")
        self._experiment = experiment
        self._pair = pair
        self._schedule = schedule
        cluster, costs = experiment.cluster, experiment.costs_of(schedule)
        num_stages = cluster.num_stages
        partition = pair.partition(num_stages)
        self._link = LinkConfig()
        parts = flow_parts(schedule, experiment.config)
        emulation = Emulation(cluster_text, costs.hop_ms, time.monotonic(), time_scale, parts.cancel)
        hints = draft_for_workers(pair.draft_directory) if pair.draft_directory is not None and parts.hints else None
        wall = WallClock(emulation.start_s, time_scale)
        self._clock = clock = Clock()
        self._driver = make_driver(experiment, pair, costs, clock)
        first, control = cluster.links[0], cluster.control
        commit_s = control.latency_ms * costs.broadcast_hops(num_stages) / 1000
        self._links = {
            Route.NEXT: VirtualLink(first, (first.latency_ms + costs.hop_ms) / 1000, Random(0)),
            Route.WORKERS: VirtualLink(control, commit_s, Random(1)),
        }
        self._sizes = Sizes(cluster.model)
        self._informed = Informed(self._driver, experiment.measured_costs(0, pair.taps is not None))
        self._actor = PacedActor(self._informed, clock, wall, self._links, self._sizes)
        self._wall = wall
        self._next_id = 0
        self._result_bytes = 0
        self._worker_bytes: dict[int, int] = {}  # received by each worker, by stage
        torch.set_num_threads(1)
        processes = LocalProcesses(num_stages, threads=1, device="cpu", module="flowspec.emulation.local")
        self._connections = RemoteConnections(processes, self._link)
        try:
            self._connections.configure(
                pair.checkpoint.full_name,
                partition,
                "float32",
                emulation,
                hints,
                pair.weights,
                taps=pair.taps,
                blocks=pair.tap_block,
            )
            self._connections.await_ready(lambda done: None)
        except BaseException:
            self.close()
            raise

    def run(
        self, prompts: Sequence[tuple[int, str]], progress: Callable[[float], None] = lambda done: None
    ) -> Emulated:
        """One request after the other. Raises ``WorkerError`` when the machine cannot keep up."""
        records: list[RequestRecord] = []
        for index, prompt in prompts:
            progress(len(records) / len(prompts))
            records.append(self._run(index, self._pair.encode(prompt)))
        return Emulated(records, self._actor.lag_s)

    def _run(self, index: int, prompt_ids: tuple[int, ...]) -> RequestRecord:
        experiment, num_stages = self._experiment, self._experiment.cluster.num_stages
        self._informed.costs = experiment.measured_costs(index, self._pair.taps is not None)
        pace = Pace(self._informed.costs)
        schedule = experiment.make_schedule(self._schedule, num_stages, self._pair.source, pace)
        start_s = self._clock.now = max(self._clock.now, self._wall.now())
        self._clock.spans.clear()
        bytes_before = self._num_bytes()
        request = Request(self._next_id, prompt_ids, experiment.params_of(index), self._pair.eos_ids)
        self._next_id += 1
        generation, sends = self._driver.submit(request, schedule)
        self._actor.place.wake()
        self._connections.send(self._actor.stamp(sends))
        emissions, last_news = Emissions(0.0), time.monotonic()
        while self._driver.num_open:
            wait_s = min(_LONGEST_WAIT_S, max(0.0, self._actor.wake_s - time.monotonic()))
            for message in self._connections.receive(wait_s):
                if isinstance(message, Stamped):
                    last_news = time.monotonic()
                    self._note_result(message)
                    self._actor.on_message(message)
            self._connections.send(self._actor.on_idle() or [])
            if len(generation.output_ids) > emissions.num_tokens:
                emissions.note(self._clock.now - start_s, len(generation.output_ids))
            if time.monotonic() - last_news > self._link.stall_timeout_s:
                raise WorkerError(f"the emulated pipeline has been silent for {self._link.stall_timeout_s:.0f} s")
        self._check_lag()
        if generation.error is not None:
            raise generation.error
        own = [replace(s, start_s=s.start_s - start_s, end_s=s.end_s - start_s) for s in self._clock.spans]
        num_bytes = self._num_bytes() - bytes_before
        return RequestRecord.of(
            index,
            generation.output_ids,
            emissions,
            generation.stats,
            [*own, *forward_spans(generation.stats, start_s, {})],  # all have one clock, the virtual one
            num_stages + 1,
            num_bytes,
            with_spans=True,
            start_s=start_s,
        )

    def _note_result(self, stamped: Stamped) -> None:
        if isinstance(stamped.message, (Hint, Result)):
            self._result_bytes += self._sizes.num_bytes(stamped.message)
        if isinstance(stamped.message, Result):
            self._worker_bytes |= {timing.stage: timing.link_bytes for timing in stamped.message.timings}

    def _num_bytes(self) -> int:
        """On all links so far: the driver's own, results, and what workers after the first have received."""
        commits = self._links[Route.WORKERS].num_bytes * self._experiment.cluster.num_stages
        between = sum(num for stage, num in self._worker_bytes.items() if stage > 1)
        return self._links[Route.NEXT].num_bytes + commits + between + self._result_bytes

    def _check_lag(self) -> None:
        cluster = self._experiment.cluster
        stage_s = max(cluster.stage_s(stage, 1, 0) for stage in range(cluster.num_stages))
        if self._actor.lag_s > stage_s:
            raise WorkerError(
                f"this machine cannot keep up: the wall clock fell {self._actor.lag_s * 1000:.0f} ms of virtual time "
                f"behind, more than the {stage_s * 1000:.0f} ms of a stage; use a larger --time-scale"
            )

    def close(self) -> None:
        """End the workers."""
        self._connections.close()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
