"""What is simulated or emulated, apart from schedule and prompts, and what it costs there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from flowspec.config import ScheduleConfig
from flowspec.core import MAX_SEED, SamplingParams
from flowspec.draft.base import LANGUAGE_MODEL, DraftSource, Levels
from flowspec.driver import Driver
from flowspec.emulation.costs import DriverCosts
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.pairs import ModelPair
from flowspec.emulation.start_up import AS_USUAL, StartUp, measure
from flowspec.emulation.virtual_time import Clock, StageCost
from flowspec.errors import UsageError
from flowspec.request.request import Common
from flowspec.request.work import Work
from flowspec.schedule.base import Schedule
from flowspec.schedule.catalogue import is_flow, make_schedule
from flowspec.schedule.pace import MeasuredCosts, Pace

TENSOR_PARALLEL = ("tp-megatron", "tp-galaxy")


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

    cluster: ClusterDescription
    config: ScheduleConfig
    params: SamplingParams
    as_published: bool = False  # the driver's costs of the paper's code for all schedules but ``flow``
    faults: Faults = Faults()
    start_up: StartUp = AS_USUAL  # what the driver believes of the costs
    with_spans: bool = False  # keep every piece of work, for traces
    int8_draft: bool = False  # a draft pass of our driver costs what int8 weights cost

    def __post_init__(self) -> None:
        if self.int8_draft and not self.cluster.ours.int8_draft_pass_ms:
            raise UsageError(
                f"the cluster file {self.cluster.name} has no int8_draft_pass_ms in [driver.ours]; add it, "
                "or simulate without int8 drafts"
            )

    @property
    def is_sampled(self) -> bool:
        """Whether the texts are drawn, and not greedy."""
        return self.params.temperature > 0

    def params_of(self, index: int) -> SamplingParams:
        """Every prompt is sampled by a seed of its own."""
        if not self.is_sampled:
            return self.params
        return replace(self.params, seed=((self.params.seed or 0) + index) % (MAX_SEED + 1))

    def costs_of(self, schedule: str) -> DriverCosts:
        if self.as_published and not is_flow(schedule):
            return self.cluster.published
        ours = self.cluster.ours
        if not self.int8_draft:
            return ours
        block_pass_ms, model_pass_ms = ours.int8_block_pass_ms or None, ours.int8_model_pass_ms or None
        pass_ms = ours.int8_draft_pass_ms
        return replace(ours, draft_pass_ms=pass_ms, block_pass_ms=block_pass_ms, model_pass_ms=model_pass_ms)

    def measured_costs(self, index: int, has_taps: bool) -> MeasuredCosts:
        """What the driver believes of the cluster's costs when it has just been started for that prompt.

        ``has_taps``: rows bring a draft's features along.
        """
        return measure(self.cluster, self.start_up, self.faults.seed + index, has_taps)

    def make_schedule(self, name: str, num_stages: int, source: DraftSource | None, pace: Pace) -> Schedule:
        """For one request; ``pace``: of all that run at once."""
        return make_schedule(name, self.config, num_stages, pace=pace, levels=Levels.of(source))

    def forward_cost(self, schedule: str, worker: int) -> StageCost:
        """What a forward costs that worker."""
        cluster, slowdown = self.cluster, self.faults.slowdown
        stage_s = partial(cluster.stage_s, worker - 1)
        match schedule:
            case "tp-megatron" | "tp-galaxy":
                return lambda rows, context, now, taps: cluster.tensor_parallel_s(schedule, rows, context)
            case _ if slowdown is not None and slowdown.worker == worker:
                return lambda rows, context, now, taps: stage_s(rows, context, taps) * slowdown.factor(now)
            case _:
                return lambda rows, context, now, taps: stage_s(rows, context, taps)


def _pass_ms(experiment: Experiment, source: DraftSource | None, costs: DriverCosts) -> float:
    """What a forward of the draft costs. Raises ``UsageError``."""
    if source is not None and source.block_len > 1:
        key, pass_ms, what = "block_pass_ms", costs.block_pass_ms, "a block draft"
    elif source is not None and source.name == LANGUAGE_MODEL:
        key, pass_ms, what = "model_pass_ms", costs.model_pass_ms, "a language model"
    else:
        return costs.draft_pass_ms
    if pass_ms is None:
        key = f"int8_{key}" if experiment.int8_draft else key
        raise UsageError(
            f"the cluster file {experiment.cluster.name} has no {key} for each driver; add it, or simulate another "
            f"draft than {what}"
        )
    return pass_ms


def make_driver(experiment: Experiment, pair: ModelPair, costs: DriverCosts, clock: Clock) -> Driver:
    """A driver whose work costs time on ``clock``. Raises ``UsageError`` where the cluster file lacks a cost."""
    pass_ms = _pass_ms(experiment, pair.source, costs)
    costs_ms = {
        Work.DRAFT_PASS: pass_ms,
        Work.MERGE_PASS: pass_ms + costs.merge_ms,
        Work.GROW: costs.grow_ms,
        Work.HINT: costs.hint_ms,
        Work.LM_HEAD: costs.lm_head_ms,
        Work.VERIFY: costs.verify_ms,
        Work.SEND: costs.send_ms,
    }

    def charge(kind: Work, num_rows: int, start_s: float, end_s: float) -> None:
        if costs_ms[kind]:
            clock.spend(costs_ms[kind] / 1000, 0, kind.value, num_rows)

    common = Common(pair.head, experiment.config.pipeline, pair.max_positions, clock, charge)
    tapped = () if pair.taps is None else pair.taps.layers
    return Driver(common, pair.source, num_stages=experiment.cluster.num_stages, tapped=tapped)
