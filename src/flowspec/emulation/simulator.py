"""The real driver and workers on a virtual clock: what a schedule would do on a cluster that is only described.

Tokens come from the model pair behind the simulation, costs from the cluster's description. Every request runs alone on
a cluster of its own, from time 0; the same seed gives the same digits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from flowspec.emulation.costs import DriverCosts
from flowspec.emulation.experiment import TENSOR_PARALLEL, Experiment, make_driver
from flowspec.emulation.pairs import ModelPair
from flowspec.emulation.start_up import Informed
from flowspec.emulation.virtual_time import Clock, EmulatedHinter, EmulatedStage, Place, Sizes, VirtualLink
from flowspec.request.emissions import Emissions
from flowspec.request.generation import Generation
from flowspec.request.records import RequestRecord
from flowspec.request.request import Request
from flowspec.schedule.catalogue import flow_parts
from flowspec.schedule.pace import Pace
from flowspec.wire.actor import Send
from flowspec.wire.transport import DRIVER, Link, links_of
from flowspec.worker.actor import PATIENCE_S, Worker


def simulate(
    experiment: Experiment, pair: ModelPair, schedule: str, prompts: Sequence[tuple[int, str]]
) -> list[RequestRecord]:
    """Run each (index, prompt) alone by one schedule. Raises ``UsageError`` for what cannot be simulated."""
    return [_Simulation(experiment, pair, schedule, index).run(index, pair.encode(prompt)) for index, prompt in prompts]


@dataclass(frozen=True)
class LoadRecord:
    """One generation among others on one cluster; seconds since the first one was submitted."""

    index: int  # of the prompt
    token_ids: tuple[int, ...]
    emissions: Emissions


def simulate_load(
    experiment: Experiment, pair: ModelPair, schedule: str, prompts: Sequence[tuple[int, str]], num_clients: int
) -> list[LoadRecord]:
    """Clients that each submit the next (index, prompt) as soon as their last one has ended, all on one cluster."""
    encoded = [(index, pair.encode(prompt)) for index, prompt in prompts]
    return _Simulation(experiment, pair, schedule, prompts[0][0]).run_load(encoded, num_clients)


@dataclass
class _Run:
    """One request on the simulated cluster."""

    index: int  # of the prompt
    generation: Generation
    emissions: Emissions

    def note(self, now: float) -> None:
        """The driver has had its turn. Raises what the request has met."""
        if self.generation.error is not None:
            raise self.generation.error
        if len(self.generation.output_ids) > self.emissions.num_tokens:
            self.emissions.note(now, len(self.generation.output_ids))


class _Simulation:
    """One cluster for one request."""

    def __init__(self, experiment: Experiment, pair: ModelPair, schedule: str, first_index: int) -> None:
        """``first_index``: of the prompts for which the cluster was started."""
        self._experiment = experiment
        self._pair = pair
        cluster = experiment.cluster
        costs = experiment.costs_of(schedule)
        # Tensor parallelism is one stage on all devices; the tree goes through it at once.
        is_pipeline = schedule not in TENSOR_PARALLEL
        num_stages, page = (cluster.num_stages, schedule) if is_pipeline else (1, "serial")
        clock = Clock()
        measured = experiment.measured_costs(first_index, pair.taps is not None)
        pace = Pace(measured)
        self._make_schedule = lambda: experiment.make_schedule(page, num_stages, pair.source, pace)
        self._driver = make_driver(experiment, pair, costs, clock)
        wants_hints = self._make_schedule().wants_hints
        patience_s = PATIENCE_S if flow_parts(page, experiment.config).cancel else None
        self._workers: list[Worker] = []
        self._clock = clock
        self._places = [Place(Informed(self._driver, measured), clock)]
        for index, stage in enumerate(pair.make_stages(num_stages), start=1):
            clock = Clock()
            taps = pair.make_taps(index, num_stages)
            forward_s = experiment.forward_cost(schedule, index)
            emulated = EmulatedStage(stage, index, clock, forward_s, 0 if taps is None else taps.num_blocks)
            hinter = pair.make_hinter(index, num_stages) if wants_hints else None
            if hinter is not None:
                hinter = EmulatedHinter(hinter, index, clock, cluster.devices[index - 1].hint_s(cluster.model))
            worker = Worker(
                emulated,
                index,
                clock,
                patience_s,
                hinter,
                forward_s=lambda rows, cost=forward_s: cost(rows, 0, 0.0, 0),
                taps=taps,
            )
            self._workers.append(worker)
            self._places.append(Place(self._workers[-1], clock))
        self._sizes = Sizes(cluster.model)
        self._links = self._make_links(costs, num_stages)

    def _make_links(self, costs: DriverCosts, num_stages: int) -> dict[Link, VirtualLink]:
        cluster, faults = self._experiment.cluster, self._experiment.faults
        models = [*cluster.links[:num_stages], cluster.links[-1]]
        data = [*(Link(place, place + 1, "data") for place in range(num_stages)), Link(num_stages, DRIVER, "control")]
        links = [(link, model, model.latency_ms + costs.hop_ms) for link, model in zip(data, models, strict=True)]
        commit_ms = cluster.control.latency_ms * costs.broadcast_hops(num_stages)
        hint_ms = cluster.control.latency_ms
        links += [(Link(place, DRIVER, "control"), cluster.control, hint_ms) for place in range(1, num_stages)]
        links += [(Link(DRIVER, place, "control"), cluster.control, commit_ms) for place in range(1, num_stages + 1)]
        return {
            link: VirtualLink(model, ms / 1000, Random(f"{faults.seed} {link}"), faults.max_delay_ms / 1000)
            for link, model, ms in links
        }

    def run(self, index: int, prompt_ids: tuple[int, ...]) -> RequestRecord:
        run = self._submit(index, prompt_ids)
        for _ in self._driver_turns():
            run.note(self._clock.now)
        for worker in self._workers:
            worker.check_integrity()
            assert not worker.num_open, "a cache has leaked"
        return RequestRecord.of(
            index,
            run.generation.output_ids,
            run.emissions,
            run.generation.stats,
            [span for place in self._places for span in place.clock.spans],
            len(self._places),
            sum(link.num_bytes for link in self._links.values()),
            self._experiment.with_spans,
        )

    def run_load(self, prompts: Sequence[tuple[int, tuple[int, ...]]], num_clients: int) -> list[LoadRecord]:
        waiting = deque(prompts)
        running = [self._submit_next(waiting) for _ in range(min(num_clients, len(waiting)))]
        records: list[LoadRecord] = []
        for _ in self._driver_turns():
            for run in list(running):
                run.note(self._clock.now)
                if run.generation.is_finished:
                    records.append(LoadRecord(run.index, tuple(run.generation.output_ids), run.emissions))
                    running.remove(run)
            while waiting and len(running) < num_clients:
                running.append(self._submit_next(waiting))
        return records

    def _submit_next(self, waiting: deque[tuple[int, tuple[int, ...]]]) -> _Run:
        index, prompt_ids = waiting.popleft()
        return self._submit(index, prompt_ids, request_id=index)

    def _submit(self, index: int, prompt_ids: tuple[int, ...], request_id: int = 0) -> _Run:
        request = Request(request_id, prompt_ids, self._experiment.params_of(index), self._pair.eos_ids)
        now = self._clock.now
        generation, sends = self._driver.submit(request, self._make_schedule())
        self._places[DRIVER].wake()
        self._post(DRIVER, now, sends)
        return _Run(index, generation, Emissions(now))

    def _driver_turns(self) -> Iterator[None]:
        """Let whoever comes next do one thing, until nothing is open; yields after each turn of the driver."""
        while self._driver.num_open:
            source = min(range(len(self._places)), key=lambda place: self._places[place].next_s)
            place = self._places[source]
            assert place.next_s < float("inf"), "the pipeline has stalled"
            sends = place.run()
            self._post(source, place.clock.now, sends)
            if source == DRIVER:
                yield

    def _post(self, source: int, now: float, sends: list[Send]) -> None:
        """Everything an actor sends at once leaves at once; each connection then has its own pace."""
        for send in sends:
            num_bytes = self._sizes.num_bytes(send.message)
            for link in links_of(send.route, source, len(self._workers)):
                arrival_s = self._links[link].arrival_s(now, num_bytes)
                self._places[link.target].deliver(arrival_s, send.message)
