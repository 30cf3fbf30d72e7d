"""The real driver and workers on a virtual clock: what a schedule would do on a cluster that is only described.

Tokens come from the model pair behind the simulation, costs from the cluster's description. Every request runs alone on
a cluster of its own, from time 0; the same seed gives the same digits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

from flowspec.config import ScheduleConfig
from flowspec.core import MAX_SEED, DraftDType, Partition, SamplingParams
from flowspec.draft.base import DraftSource
from flowspec.draft.catalogue import choose_draft, load_draft
from flowspec.draft.synthetic import SyntheticSource
from flowspec.driver import Driver
from flowspec.emulation.description import ClusterSpec, DriverCosts
from flowspec.emulation.virtual_time import Clock, EmulatedHinter, EmulatedStage, Place, Sizes, VirtualLink
from flowspec.errors import UsageError
from flowspec.model.hint_head import HINT_DEPTH, load_hinter
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import Stage
from flowspec.model.synthetic import VOCAB_SIZE, Language, SyntheticHead, SyntheticHinter, SyntheticStage, quality
from flowspec.model.target_head import LogitsHead, TargetHead
from flowspec.request.generation import Generation, Request
from flowspec.request.meter import Work
from flowspec.request.records import RequestRecord, SegmentRecord, Span
from flowspec.request.stats import Stats
from flowspec.schedule.base import Schedule
from flowspec.schedule.catalogue import flow_parts, make_schedule
from flowspec.schedule.pace import Pace
from flowspec.wire.messages import Route, Send
from flowspec.wire.transport import DRIVER, Link
from flowspec.worker.actor import PATIENCE_S, Hinter, Worker

TENSOR_PARALLEL = ("tp-megatron", "tp-galaxy")
PROMPT_LEN = 64  # tokens of a synthetic prompt


class ModelPair(Protocol):
    """The models behind a simulation: they give the tokens, and cost nothing."""

    @property
    def head(self) -> LogitsHead: ...

    @property
    def source(self) -> DraftSource | None: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def make_stages(self, num_stages: int) -> list[Any]:
        """Stages for one request; weights may be shared."""
        ...

    def make_hinter(self, index: int, num_stages: int) -> Hinter | None:
        """What worker ``index`` of so many guesses with, if it gives hints."""
        ...

    def encode(self, prompt: str) -> tuple[int, ...]: ...


class SyntheticPair:
    """``model.synthetic``: no weights, thousands of tokens in seconds."""

    def __init__(self, draft_quality: str, top_k: int) -> None:
        """Raises ``UsageError`` for an unknown quality."""
        language = Language(quality(draft_quality))
        self.head = SyntheticHead(language)
        self.source = SyntheticSource(language, top_k)
        self.max_positions = 1 << 20
        self.eos_ids: frozenset[int] = frozenset()

    def make_stages(self, num_stages: int) -> list[Any]:
        return [SyntheticStage(i == 0, i == num_stages - 1) for i in range(num_stages)]

    def make_hinter(self, index: int, num_stages: int) -> Hinter | None:
        depth = index / num_stages
        return SyntheticHinter(self.source.language, depth) if HINT_DEPTH <= depth < 1 else None

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Another text for another prompt."""
        random = Random(prompt)
        return tuple(random.randrange(VOCAB_SIZE) for _ in range(PROMPT_LEN))


class CheckpointPair:
    """A real model and draft, as the demo pair, cut as evenly as its layers allow."""

    def __init__(
        self, model: str, draft: str, top_k: int, is_coupled: bool = True, draft_dtype: DraftDType = "auto"
    ) -> None:
        """``is_coupled``: see ``draft.eagle.EagleSource``. Raises ``UsageError`` for what cannot be loaded."""
        self.checkpoint = Checkpoint.open(model)
        head = TargetHead(self.checkpoint.load_lm_head("float32", "cpu"))
        chosen = choose_draft(self.checkpoint, draft, draft_dtype)
        self.head = head
        self.source = load_draft(chosen, self.checkpoint, head, top_k, "float32", "cpu", is_coupled, draft_dtype)
        self.max_positions = self.checkpoint.max_positions
        self.eos_ids = self.checkpoint.eos_token_ids
        self._tokenizer = self.checkpoint.load_tokenizer()
        self._stages: dict[int, list[Stage]] = {}
        self.draft_directory = chosen if isinstance(chosen, Path) else None
        self._hinters: dict[tuple[int, int], Hinter | None] = {}

    def make_stages(self, num_stages: int) -> list[Any]:
        if num_stages not in self._stages:
            self._stages[num_stages] = [
                Stage.load(self.checkpoint, layers, "float32", "cpu") for layers in self.partition(num_stages).stages
            ]
        return self._stages[num_stages]

    def make_hinter(self, index: int, num_stages: int) -> Hinter | None:
        if self.draft_directory is None:
            return None
        if (index, num_stages) not in self._hinters:
            end = self.partition(num_stages).stages[index - 1].end
            self._hinters[index, num_stages] = load_hinter(self.draft_directory, self.checkpoint, end, "float32", "cpu")
        return self._hinters[index, num_stages]

    def partition(self, num_stages: int) -> Partition:
        """Raises ``UsageError`` for more stages than layers."""
        name, num_layers = self.checkpoint.name, self.checkpoint.num_layers
        if num_stages > num_layers:
            raise UsageError(f"{name} has {num_layers} layers, too few for {num_stages} stages; use --model synthetic")
        return Partition.even(num_layers, num_stages)

    def encode(self, prompt: str) -> tuple[int, ...]:
        prompt_ids = tuple(self._tokenizer(prompt, verbose=False).input_ids)
        if not 0 < len(prompt_ids) < self.max_positions:
            raise UsageError(
                f"a prompt has {len(prompt_ids)} tokens; the model has room for 1 to {self.max_positions - 1}"
            )
        return prompt_ids


@dataclass(frozen=True)
class Slowdown:
    """From a moment on a worker takes ``times`` as long."""

    worker: int
    from_s: float
    times: float

    def factor(self, now: float) -> float:
        return self.times if now >= self.from_s else 1.0


@dataclass(frozen=True)
class Faults:
    """What goes wrong on demand; the tokens must not change."""

    max_delay_ms: float = 0.0  # every message, on every connection of its own, is late by up to this
    slowdown: Slowdown | None = None
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """What is simulated, apart from schedule and prompts."""

    cluster: ClusterSpec
    config: ScheduleConfig
    params: SamplingParams
    as_published: bool = False  # the driver's costs of the paper's code for all schedules but ``flow``
    faults: Faults = Faults()
    with_spans: bool = False  # keep every piece of work, for traces
    int8_draft: bool = False  # a draft pass of our driver costs what int8 weights cost

    def __post_init__(self) -> None:
        if self.int8_draft and not self.cluster.ours.int8_draft_pass_ms:
            raise UsageError(
                f"the cluster file {self.cluster.name} has no int8_draft_pass_ms in [driver.ours]; add it, "
                "or simulate without int8 drafts"
            )

    def params_of(self, index: int) -> SamplingParams:
        """Every prompt is sampled by a seed of its own."""
        if self.params.temperature == 0:
            return self.params
        return replace(self.params, seed=((self.params.seed or 0) + index) % (MAX_SEED + 1))

    def costs_of(self, schedule: str) -> DriverCosts:
        if self.as_published and not schedule.startswith(("flow", "auto")):
            return self.cluster.published
        ours = self.cluster.ours
        return replace(ours, draft_pass_ms=ours.int8_draft_pass_ms) if self.int8_draft else ours

    def stage_s(self, num_rows: int) -> float:
        """As ``schedule.pace.Costs``: what a start-up measurement would tell."""
        return max(self.cluster.stage_s(stage, num_rows, PROMPT_LEN) for stage in range(self.cluster.num_stages))

    def wire_s(self, num_rows: int) -> float:
        model = self.cluster.model
        num_bytes = num_rows * model.hidden_size * model.bytes_per_activation
        return max(link.transfer_s(num_bytes) for link in self.cluster.links[1:])

    def make_schedule(
        self, name: str, num_stages: int, source: DraftSource | None, pace: Pace | None = None
    ) -> Schedule:
        """For one request, with the costs that a start-up measurement would tell; ``pace``: of requests at once."""
        steady_steps = 1 if source is None else source.steady_steps
        return make_schedule(name, self.config, num_stages, pace=pace or Pace(self), steady_steps=steady_steps)

    def forward_cost(self, schedule: str, worker: int) -> Callable[[int, int, float], float]:
        """What a forward costs that worker: (rows, rows in the cache, time) -> seconds."""
        cluster, slowdown = self.cluster, self.faults.slowdown
        match schedule:
            case "tp-megatron" | "tp-galaxy":
                return lambda rows, context, now: cluster.tensor_parallel_s(schedule, rows, context)
            case _ if slowdown is not None and slowdown.worker == worker:
                return lambda rows, context, now: cluster.stage_s(worker - 1, rows, context) * slowdown.factor(now)
            case _:
                return lambda rows, context, now: cluster.stage_s(worker - 1, rows, context)


def simulate(
    experiment: Experiment, pair: ModelPair, schedule: str, prompts: Sequence[tuple[int, str]]
) -> list[RequestRecord]:
    """Run each (index, prompt) alone by one schedule. Raises ``UsageError`` for what cannot be simulated."""
    return [_Simulation(experiment, pair, schedule).run(index, pair.encode(prompt)) for index, prompt in prompts]


@dataclass(frozen=True)
class LoadRecord:
    """One generation among others on one cluster; seconds since the first one was submitted."""

    index: int  # of the prompt
    token_ids: tuple[int, ...]
    start_s: float
    first_s: float  # when the first tokens were emitted
    end_s: float


def simulate_load(
    experiment: Experiment, pair: ModelPair, schedule: str, prompts: Sequence[tuple[int, str]], num_clients: int
) -> list[LoadRecord]:
    """Clients that each submit the next (index, prompt) as soon as their last one has ended, all on one cluster."""
    encoded = [(index, pair.encode(prompt)) for index, prompt in prompts]
    return _Simulation(experiment, pair, schedule).run_load(encoded, num_clients)


class DriverMeter:
    """Charges the driver's work to its clock."""

    def __init__(self, costs: DriverCosts, clock: Clock) -> None:
        self._clock = clock
        self._costs_ms = {
            Work.DRAFT_PASS: costs.draft_pass_ms,
            Work.MERGE_PASS: costs.draft_pass_ms + costs.merge_ms,
            Work.HINT: costs.hint_ms,
            Work.LM_HEAD: costs.lm_head_ms,
            Work.VERIFY: costs.verify_ms,
            Work.SEND: costs.send_ms,
        }

    @contextmanager
    def work(self, kind: Work, num_rows: int) -> Iterator[None]:
        yield
        if self._costs_ms[kind]:
            self._clock.spend(self._costs_ms[kind] / 1000, 0, kind.value, num_rows)


def make_driver(experiment: Experiment, pair: ModelPair, costs: DriverCosts, clock: Clock) -> Driver:
    """A driver whose work costs time on ``clock``."""
    meter = DriverMeter(costs, clock)
    num_stages = experiment.cluster.num_stages
    config = experiment.config.pipeline
    return Driver(pair.head, pair.source, config, pair.max_positions, clock, meter, num_stages=num_stages)


class _Simulation:
    """One cluster for one request."""

    def __init__(self, experiment: Experiment, pair: ModelPair, schedule: str) -> None:
        self._experiment = experiment
        self._pair = pair
        cluster = experiment.cluster
        costs = experiment.costs_of(schedule)
        # Tensor parallelism is one stage on all devices; the tree goes through it at once.
        is_pipeline = schedule not in TENSOR_PARALLEL
        num_stages, page = (cluster.num_stages, schedule) if is_pipeline else (1, "serial")
        clock = Clock()
        self._pace = Pace(experiment)
        self._make_schedule = lambda: experiment.make_schedule(page, num_stages, pair.source, self._pace)
        self._driver = make_driver(experiment, pair, costs, clock)
        wants_hints = self._make_schedule().wants_hints
        patience_s = PATIENCE_S if flow_parts(page, experiment.config).cancel else None
        self._workers: list[Worker] = []
        self._places = [Place(self._driver, clock)]
        for index, stage in enumerate(pair.make_stages(num_stages), start=1):
            clock = Clock()
            forward_s = experiment.forward_cost(schedule, index)
            emulated = EmulatedStage(stage, index, clock, forward_s)
            hinter = pair.make_hinter(index, num_stages) if wants_hints else None
            if hinter is not None:
                hinter = EmulatedHinter(hinter, index, clock, cluster.devices[index - 1].hint_s(cluster.model))
            worker = Worker(
                emulated, index, clock, patience_s, hinter, forward_s=lambda rows, cost=forward_s: cost(rows, 0, 0.0)
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
        params = self._experiment.params_of(index)
        generation, sends = self._driver.submit(
            Request(0, prompt_ids, params, self._pair.eos_ids), self._make_schedule()
        )
        self._places[DRIVER].wake()
        self._post(DRIVER, 0.0, sends)
        emissions: list[tuple[float, int]] = []  # (time, tokens so far)
        sent_s: dict[int, float] = {}
        while self._driver.num_open:
            place = min(range(len(self._places)), key=lambda place: self._places[place].next_s)
            now = self._places[place].next_s
            assert now < float("inf"), "the pipeline has stalled"
            num_segments = generation.next_segment_id
            sends = self._places[place].run()
            now = self._places[place].clock.now
            self._post(place, now, sends)
            for segment_id in range(num_segments, generation.next_segment_id):
                sent_s[segment_id] = now
            if len(generation.output_ids) > (emissions[-1][1] if emissions else 0):
                emissions.append((now, len(generation.output_ids)))
        if generation.error is not None:
            raise generation.error
        for worker in self._workers:
            worker.check_integrity()
            assert not worker.num_open, "a cache has leaked"
        return make_record(
            index,
            generation.output_ids,
            generation.stats,
            [span for place in self._places for span in place.clock.spans],
            len(self._places),
            emissions,
            sent_s,
            sum(link.num_bytes for link in self._links.values()),
            self._experiment.with_spans,
        )

    def run_load(self, prompts: Sequence[tuple[int, tuple[int, ...]]], num_clients: int) -> list[LoadRecord]:
        waiting = deque(prompts)
        running: dict[int, tuple[Generation, float, list[float]]] = {}  # by prompt: start, and when tokens came
        records: list[LoadRecord] = []
        now = 0.0
        while waiting or running:
            while waiting and len(running) < num_clients:
                index, prompt_ids = waiting.popleft()
                request = Request(index, prompt_ids, self._experiment.params_of(index), self._pair.eos_ids)
                generation, sends = self._driver.submit(request, self._make_schedule())
                running[index] = generation, now, []
                self._places[DRIVER].wake()
                self._post(DRIVER, now, sends)
            place = min(range(len(self._places)), key=lambda place: self._places[place].next_s)
            assert self._places[place].next_s < float("inf"), "the pipeline has stalled"
            sends = self._places[place].run()
            self._post(place, self._places[place].clock.now, sends)
            if place != DRIVER:
                continue
            now = self._places[DRIVER].clock.now
            for index, (generation, start_s, emitted_s) in list(running.items()):
                if len(generation.output_ids) and not emitted_s:
                    emitted_s.append(now)
                if generation.error is not None:
                    raise generation.error
                if generation.is_finished:
                    records.append(LoadRecord(index, tuple(generation.output_ids), start_s, emitted_s[0], now))
                    del running[index]
        return records

    def _post(self, source: int, now: float, sends: list[Send]) -> None:
        """Everything an actor sends at once leaves at once; each connection then has its own pace."""
        num_stages = len(self._workers)
        for send in sends:
            match send.route:
                case Route.NEXT:
                    links = [Link(source, source + 1, "data")]
                case Route.WORKERS:
                    links = [Link(DRIVER, target, "control") for target in range(1, num_stages + 1)]
                case Route.DRIVER:
                    links = [Link(source, DRIVER, "control")]
            num_bytes = self._sizes.num_bytes(send.message)
            for link in links:
                arrival_s = self._links[link].arrival_s(now, num_bytes)
                self._places[link.target].deliver(arrival_s, send.message)


def forward_spans(stats: Stats, start_s: float) -> list[Span]:
    """What the workers say of the segments that came back, since ``start_s`` on their clock."""
    return [
        Span(timing.stage, timing.start_s - start_s, timing.end_s - start_s, "forward", timing.num_rows)
        for timings in stats.timings
        for timing in timings
    ]


def make_record(
    index: int,
    token_ids: Sequence[int],
    stats: Stats,
    spans: Sequence[Span],
    num_places: int,
    emissions: Sequence[tuple[float, int]],
    sent_s: Mapping[int, float],
    link_bytes: int,
    with_spans: bool,
) -> RequestRecord:
    """``emissions``: (time, tokens so far), one for each time that tokens came; ``sent_s``: by segment id, if known."""
    (first_s, num_first), end_s = emissions[0], emissions[-1][0]
    start_s = first_s if end_s > first_s else 0.0
    busy_s = [0.0] * num_places
    for span in spans:
        busy_s[span.place] += max(0.0, min(span.end_s, end_s) - max(span.start_s, start_s))
    return RequestRecord(
        index,
        tuple(token_ids),
        first_s,
        num_first,
        end_s,
        stats.segments,
        stats.rows,
        stats.drafted,
        stats.accepted,
        stats.verified,
        stats.restarts,
        stats.draft_passes,
        link_bytes,
        tuple(busy_s),
        tuple(
            SegmentRecord(i, sent_s.get(i, 0.0), segment.num_sent, segment.num_verified, segment.num_accepted)
            for i, segment in stats.by_segment.items()
        ),
        tuple(spans) if with_spans else (),
    )
