"""What ``flowspec simulate`` and ``flowspec bench`` do once their options are read: run, check, compare, draw.

Knows nothing of the command line and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowspec.bench.report import BASELINES, ratio_interval
from flowspec.bench.runner import SYNTHETIC, PairSpec, run_simulated
from flowspec.bench.trace import TraceRun
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import TENSOR_PARALLEL, Experiment
from flowspec.errors import FlowspecError, UsageError
from flowspec.request.records import RequestRecord, ScheduleResult
from flowspec.schedule.catalogue import ABLATIONS, AUTO, SCHEDULES, is_flow, make_schedule

Records = Mapping[str, Sequence[RequestRecord]]  # by schedule, in the order of the prompts
Progress = Callable[[float], None]  # the share that is done

SWEEPS = {  # name -> (what the axis shows, its points)
    "bandwidth": ("bandwidth, Mbps", (125.0, 250.0, 500.0, 1000.0)),
    "latency": ("latency, ms", (0.3, 2.0, 5.0, 20.0, 50.0)),
    "stages": ("stages", (2.0, 4.0, 8.0, 16.0)),
}
_EXCERPT_S = 3.0  # of a timeline


def check_schedules(names: Sequence[str], is_simulated: bool) -> None:
    """Raises ``UsageError`` for a name that is none, with all that there are."""
    known = (AUTO, *SCHEDULES, *ABLATIONS, *(TENSOR_PARALLEL if is_simulated else ()))
    for name in names:
        if name not in known:
            only = "; it runs in the simulator only" if name in TENSOR_PARALLEL else ""
            raise UsageError(f"schedule {name!r} is none of {', '.join(known)}{only}")


@dataclass(frozen=True)
class Study:
    """Schedules x prompts in the simulator."""

    experiment: Experiment
    pair: PairSpec
    schedules: Sequence[str]
    prompts: Sequence[str]
    jobs: int  # processes

    def __post_init__(self) -> None:
        rows = [self.row_name(schedule) for schedule in self.schedules]
        for name in rows:
            if rows.count(name) > 1:
                raise UsageError(f"schedule {name} would run twice; name it once, by its name or by its switch")

    def row_name(self, schedule: str) -> str:
        """A schedule's name in tables; it tells which mechanisms are switched off."""
        if schedule in TENSOR_PARALLEL or is_flow(schedule):
            return schedule
        return make_schedule(schedule, self.experiment.config, self.experiment.cluster.num_stages).name

    def run(self, progress: Progress) -> Records:
        """Raises ``FlowspecError`` when a schedule changes the text."""
        records = run_simulated(self.experiment, self.pair, self.schedules, self.prompts, self.jobs, progress)
        named = {self.row_name(schedule): of_prompts for schedule, of_prompts in records.items()}
        check_same_tokens(named)
        return named

    def run_first_prompt(self) -> Records:
        """The first prompt again, with its spans."""
        experiment = replace(self.experiment, with_spans=True)
        return replace(self, experiment=experiment, prompts=self.prompts[:1], jobs=1).run(lambda done: None)

    def with_temperature(self, temperature: float) -> Study:
        params = replace(self.experiment.params, temperature=temperature)
        return replace(self, experiment=replace(self.experiment, params=params))

    def with_cluster(self, cluster: ClusterDescription) -> Study:
        return replace(self, experiment=replace(self.experiment, cluster=cluster))

    def settings(self) -> dict[str, Any]:
        """What decides the figures, apart from cluster, model and seed."""
        experiment, is_real = self.experiment, self.pair.model != SYNTHETIC
        slowdown = experiment.faults.slowdown
        return {
            "max_new_tokens": experiment.params.max_tokens,
            "temperature": experiment.params.temperature,
            "num_prompts": len(self.prompts),
            "as_published": experiment.as_published,
            "draft_quality": None if is_real else self.pair.draft_quality,
            "draft": self.pair.draft if is_real else None,
            "int8_draft": experiment.int8_draft,
            "schedule_config": asdict(experiment.config),
            "faults": {
                "max_delay_ms": experiment.faults.max_delay_ms,
                "slowdown": asdict(slowdown) if slowdown else None,
            },
        }


def check_same_tokens(records: Records) -> None:
    """Raises ``FlowspecError`` when two schedules gave a prompt different tokens."""
    for (left, of_left), (right, of_right) in pairwise(records.items()):
        for a, b in zip(of_left, of_right, strict=True):
            if a.token_ids != b.token_ids:
                raise FlowspecError(
                    f"schedule {right} gave other tokens than {left} for prompt {a.index}; please report this"
                )


def results_of(records: Records) -> list[ScheduleResult]:
    return [ScheduleResult.of(name, of_prompts) for name, of_prompts in records.items()]


def ratios(records: Records, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Schedule -> baseline that ran -> the ratio of throughputs and its 95 % interval, over pairs of runs."""
    references = [name for name in BASELINES if name in records]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, of_prompts in records.items():
        triples = {reference: ratio_interval(of_prompts, records[reference], seed) for reference in references}
        found[name] = {
            reference: {key: float(f"{value:.6g}") for key, value in zip(("ratio", "low", "high"), triple, strict=True)}
            for reference, triple in triples.items()
        }
    return found


def trace_runs(first_prompt: Records) -> list[TraceRun]:
    """The first prompt of every schedule, for a trace or a timeline."""
    return [
        TraceRun(name, _places(name, of_prompts[0]), of_prompts[0].spans) for name, of_prompts in first_prompt.items()
    ]


def _places(schedule: str, record: RequestRecord) -> list[str]:
    num_workers = len(record.busy_s) - 1
    if schedule in TENSOR_PARALLEL:
        return ["driver", "all devices"]
    return ["driver", *(f"worker {index}" for index in range(1, num_workers + 1))]


def draw_timeline(path: Path, first_prompt: Records, title: str) -> None:
    """Some seconds of every schedule from the first emission on; forwards coloured by what became of their rows."""
    from flowspec.bench.plots import timeline  # here: matplotlib is only for those who want plots

    records = [of_prompts[0] for of_prompts in first_prompt.values()]
    start_s = min(record.emissions.decode_start_s for record in records)
    end_s = min(start_s + _EXCERPT_S, max(record.end_s for record in records))
    fates = [
        {s.segment_id: (s.num_accepted, s.num_verified, s.num_sent) for s in record.segment_records}
        for record in records
    ]
    timeline(path, trace_runs(first_prompt), start_s, end_s, title, fates)


@dataclass(frozen=True)
class Sweep:
    """Throughput over one property of the cluster."""

    name: str
    x_label: str
    xs: Sequence[float]
    tokens_per_s: Mapping[str, Sequence[float]]  # by schedule

    def cells(self) -> list[list[str]]:
        """A row for each schedule, below the headings."""
        rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in self.tokens_per_s.items()]
        return [["schedule", *(f"{x:g}" for x in self.xs)], *rows]

    def json(self) -> dict[str, Any]:
        series = {name: [float(f"{value:.6g}") for value in values] for name, values in self.tokens_per_s.items()}
        return {"axis": self.x_label, "values": list(self.xs), "tokens_per_s": series}


def run_sweep(study: Study, name: str, progress: Progress) -> Sweep:
    """``name`` is one of ``SWEEPS``. Stage counts that model or cluster cannot have are left out."""
    x_label, all_xs = SWEEPS[name]
    cluster = study.experiment.cluster
    xs = [x for x in all_xs if name != "stages" or x <= _max_stages(study)]
    series: dict[str, list[float]] = {study.row_name(schedule): [] for schedule in study.schedules}
    for i, x in enumerate(xs):
        records = study.with_cluster(_vary(cluster, name, x)).run(lambda done, i=i: progress((i + done) / len(xs)))
        for result in results_of(records):
            series[result.schedule].append(result.tokens_per_s)
    return Sweep(name, x_label, xs, series)


def _max_stages(study: Study) -> int:
    num_layers = study.experiment.cluster.model.num_layers
    if study.pair.model == SYNTHETIC:
        return num_layers
    from flowspec.model.backends import open_checkpoint  # here: it brings transformers, as in ``PairSpec.load``

    return min(num_layers, open_checkpoint(study.pair.model).num_layers)


def _vary(cluster: ClusterDescription, name: str, x: float) -> ClusterDescription:
    match name:
        case "bandwidth":
            return cluster.with_bandwidth(x)
        case "latency":
            return cluster.with_latency(x)
        case _:
            return cluster.with_stages(int(x))
