"""The commands ``simulate`` and ``bench``, which compare schedules. Options become a study, its figures a table."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowspec.cli_common import (
    ABLATION_NAMES,
    COMPARED_NAMES,
    SCHEDULE_NAMES,
    TerminalProgress,
    Verbose,
    errors_in_one_line,
    print_table,
    stdout,
)
from flowspec.config import PUBLISHED_TREE, EngineConfig, LockstepConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.errors import UsageError

if TYPE_CHECKING:
    from flowspec.bench.study import Records, Study, Sweep
    from flowspec.cluster import ClusterSpec
    from flowspec.records import ScheduleResult
    from flowspec.simulator import Slowdown

_SYNTHETIC = "synthetic"
_MAX_CLIENTS = 64
_NUM_SYNTHETIC_PROMPTS = 40
_DEFAULT_QUALITY = "eagle1"

ScheduleNames = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help=f"Comma list of {SCHEDULE_NAMES}; {ABLATION_NAMES}; with a cluster file also tp-megatron, tp-galaxy.",
        show_default="ar to flow",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="A prompt a line, or Spec-Bench's question.jsonl, of which the first turns count."),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(help="Prompts at most.", show_default="40 for synthetic, else all of the file, or 8 built in"),
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate for each prompt at most.")]
Seed = Annotated[int, typer.Option(help="Of the synthetic prompts and of sampling; the same seed, the same figures.")]
Draft = Annotated[
    str | None,
    typer.Option(help="Of a real model: auto, none, ngram, or the directory of a head.", show_default="auto"),
]
DraftQuality = Annotated[
    str | None,
    typer.Option(help="Of the synthetic model: eagle1 or eagle3.", show_default=_DEFAULT_QUALITY),
]
Int8Draft = Annotated[
    bool,
    typer.Option(
        "--int8-draft",
        help="The draft head has int8 weights: a real model's is quantised, and in a cluster file a draft pass of "
        "[driver.ours] costs int8_draft_pass_ms.",
    ),
]
AsPublished = Annotated[
    bool,
    typer.Option("--as-published", help="All schedules but flow pay the driver costs of the published code."),
]
NoScoreOrder = Annotated[bool, typer.Option("--no-score-order", help="lockstep sends its tree level by level.")]
NoPrune = Annotated[bool, typer.Option("--no-prune", help="lockstep prunes nothing before a round ends.")]
NoExpand = Annotated[bool, typer.Option("--no-expand", help="lockstep does not let its tree grow in flight.")]
TreeDepth = Annotated[int | None, typer.Option(help="Levels drafted at once.", show_default=f"{TreeConfig.depth}")]
TreeSize = Annotated[
    int | None,
    typer.Option(
        help="Nodes of the draft tree, the root excluded.",
        show_default=f"{TreeConfig.size - 1} for flow, {PUBLISHED_TREE.size - 1} for the others",
    ),
]
SegmentLen = Annotated[int, typer.Option(help="Nodes in one segment of flow at most; 0: by the devices' costs.")]
Jobs = Annotated[int | None, typer.Option(help="Processes that simulate.", show_default="the usable cores")]
Bandwidth = Annotated[
    float | None, typer.Option(help="Mbps of every link.", metavar="MBPS", show_default="the cluster's")
]
Latency = Annotated[
    float | None, typer.Option(help="Milliseconds of every link, one way.", metavar="MS", show_default="the cluster's")
]
Delay = Annotated[float, typer.Option(help="A fault: every message is late by up to this many ms.", metavar="MS")]
Slow = Annotated[
    str | None,
    typer.Option(help="A fault: from FROM_S on a worker takes TIMES as long.", metavar="WORKER:FROM_S:TIMES"),
]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Write the first prompt's work, for ui.perfetto.dev.", metavar="FILE")
]


def simulate(
    cluster_file: Annotated[str, typer.Argument(metavar="CLUSTER.toml", help="The cluster; see clusters/.")],
    schedule: ScheduleNames = None,
    model: Annotated[str, typer.Option(help="Gives the tokens: synthetic, demo, or a directory.")] = _SYNTHETIC,
    draft_quality: DraftQuality = None,
    draft: Draft = None,
    int8_draft: Int8Draft = False,
    prompts: PromptsFile = None,
    num_prompts: NumPrompts = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    as_published: AsPublished = False,
    no_score_order: NoScoreOrder = False,
    no_prune: NoPrune = False,
    no_expand: NoExpand = False,
    tree_depth: TreeDepth = None,
    tree_size: TreeSize = None,
    segment_len: SegmentLen = PipelineConfig.segment_len,
    jobs: Jobs = None,
    bandwidth: Bandwidth = None,
    latency: Latency = None,
    stages: Annotated[int | None, typer.Option(help="Even stages.", show_default="the cluster's")] = None,
    delay: Delay = 0.0,
    slow: Slow = None,
    clients: Annotated[
        str | None, typer.Option(help="Comma list: so many requests at once on one cluster, and what that brings.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    trace: TraceFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the throughputs.", metavar="PNG")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw what all places did for the first prompt, some seconds.", metavar="PNG")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Compare schedules on a cluster that is only described, in virtual time."""
    with errors_in_one_line(verbose), progress_bar() as progress:
        for path in (trace, plot, timeline):
            check_place(path)
        wanted = _Simulated(
            cluster_file, schedule, model, draft_quality, draft, int8_draft, prompts, num_prompts,
            SamplingParams(max_new_tokens, temperature, seed=seed), as_published,
            no_score_order, no_prune, no_expand, tree_depth, tree_size, segment_len,
            jobs, bandwidth, latency, stages, delay, slow,
        )  # fmt: skip
        counts = _client_counts(clients) if clients is not None else []
        if counts and (trace or plot or timeline):
            raise UsageError("--clients draws nothing; leave out --trace, --plot and --timeline")
        study = wanted.study()
        if counts:
            _simulate_load(study, counts, seed, wanted.overrides, as_json, progress)
            return
        from flowspec.bench.report import results_json, results_table
        from flowspec.bench.study import draw_timeline, results_of, trace_runs
        from flowspec.bench.trace import write_trace

        records = study.run(lambda done: progress("simulating", done))
        first_prompt = study.run_first_prompt() if trace or timeline else {}
        progress.stop()
        results = results_of(records)
        title = _title(study)
        if trace:
            write_trace(trace, trace_runs(first_prompt))
        if plot:
            _draw_throughput(plot, {study.experiment.cluster.name: results}, title)
        if timeline:
            draw_timeline(timeline, first_prompt, f"{title}, first prompt")
        if as_json:
            settings = study.settings() | {"overrides": wanted.overrides}
            write_json(results_json(study.experiment.cluster.name, study.pair.name, seed, settings, results))
        else:
            print_table(results_table(results))
            stdout.print(_driver_costs(study), markup=False)


def bench(
    cluster_file: Annotated[
        str | None,
        typer.Argument(metavar="[CLUSTER.toml]", help="Simulate this cluster; without one, run on this machine."),
    ] = None,
    schedule: ScheduleNames = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="synthetic (simulated only), demo, or a directory.",
            show_default="demo; with a cluster file synthetic",
        ),
    ] = None,
    draft_quality: DraftQuality = None,
    draft: Draft = None,
    int8_draft: Int8Draft = False,
    prompts: PromptsFile = None,
    num_prompts: NumPrompts = None,
    max_new_tokens: MaxNewTokens = 256,
    temperatures: Annotated[str, typer.Option(help="Comma list; 0 is greedy.")] = "0,1",
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(help="Runs of each prompt on this machine; the median one is kept.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the files go.", metavar="DIR")] = Path("bench-results"),
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Vary the cluster's bandwidth, latency and stages too.")
    ] = False,
    as_published: AsPublished = False,
    no_score_order: NoScoreOrder = False,
    no_prune: NoPrune = False,
    no_expand: NoExpand = False,
    tree_depth: TreeDepth = None,
    tree_size: TreeSize = None,
    segment_len: SegmentLen = PipelineConfig.segment_len,
    jobs: Jobs = None,
    bandwidth: Bandwidth = None,
    latency: Latency = None,
    stages: Annotated[
        int | None, typer.Option(help="Even stages.", show_default="the cluster's; on this machine 4")
    ] = None,
    delay: Delay = 0.0,
    slow: Slow = None,
    trace: TraceFile = None,
    verbose: Verbose = False,
) -> None:
    """Measure schedules x prompts x temperatures, in the simulator or on this machine, and write figures and plots."""
    with errors_in_one_line(verbose), progress_bar() as progress:
        all_temperatures = _temperatures(temperatures)
        params = SamplingParams(max_new_tokens, seed=seed)
        if cluster_file is not None:
            if repeats != 1:
                raise UsageError("--repeats is for real time; the simulator gives the same figures every time")
            wanted = _Simulated(
                cluster_file, schedule, model or _SYNTHETIC, draft_quality, draft, int8_draft, prompts, num_prompts,
                params, as_published, no_score_order, no_prune, no_expand, tree_depth, tree_size, segment_len,
                jobs, bandwidth, latency, stages, delay, slow,
            )  # fmt: skip
            study = wanted.study()
            output = _Output(out, trace, _title(study), study.experiment.cluster.name, study.pair.name)
            _bench_simulated(output, study, wanted.overrides, all_temperatures, sweep, progress)
            return
        for option, is_given in {
            "--sweep": sweep, "--draft-quality": draft_quality is not None, "--as-published": as_published,
            "--no-score-order": no_score_order, "--no-prune": no_prune, "--no-expand": no_expand,
            "--tree-depth": tree_depth is not None, "--tree-size": tree_size is not None,
            "--segment-len": segment_len != PipelineConfig.segment_len, "--jobs": jobs is not None,
            "--bandwidth": bandwidth is not None, "--latency": latency is not None, "--delay": delay != 0,
            "--slow": slow is not None,
        }.items():  # fmt: skip
            if is_given:
                raise UsageError(f"{option} is for the simulator; name a cluster file too")
        if repeats < 1:
            raise UsageError(f"--repeats is {repeats}; it must be at least 1")
        chosen = "demo" if model is None else model
        if chosen == _SYNTHETIC:
            raise UsageError("the synthetic model is for the simulator; name a cluster file too, or another model")
        here = _Here(
            chosen, "auto" if draft is None else draft, int8_draft, stages, _schedules(schedule, is_simulated=False),
            wanted_prompts(chosen, prompts, num_prompts, seed), params, repeats,
        )  # fmt: skip
        title = f"{chosen}, this machine, {_counts(len(here.prompts), params)}"
        _bench_here(_Output(out, trace, title, None, chosen), here, all_temperatures, progress)


def _bench_simulated(
    output: _Output,
    study: Study,
    overrides: dict[str, float | None],
    temperatures: Sequence[float],
    sweeps: bool,
    progress: TerminalProgress,
) -> None:
    from flowspec.bench.study import SWEEPS, run_sweep

    seed = study.experiment.params.seed or 0
    for temperature in temperatures:
        at = study.with_temperature(temperature)
        records = at.run(lambda done, t=temperature: progress(f"temperature {t:g}", done))
        progress.stop()
        output.add_run(temperature, records, seed, at.settings() | {"overrides": overrides})
    stdout.print(_driver_costs(study), markup=False)
    first = study.with_temperature(temperatures[0])
    output.add_first_prompt(first.run_first_prompt())
    for name in SWEEPS if sweeps else ():
        output.add_sweep(run_sweep(first, name, lambda done, name=name: progress(f"sweep of {name}", done)))
        progress.stop()
    output.finish()


@dataclass(frozen=True)
class _Here:
    """What is measured on this machine."""

    model: str
    draft: str
    int8_draft: bool
    stages: int | None
    schedules: list[str]
    prompts: list[str]
    params: SamplingParams
    repeats: int


def _bench_here(output: _Output, here: _Here, temperatures: Sequence[float], progress: TerminalProgress) -> None:
    from flowspec.bench.local import run_local, warm_up
    from flowspec.llm import LLM

    first_prompt: Records | None = None
    draft_dtype = "int8" if here.int8_draft else "auto"
    config = EngineConfig(keeps_caches=False)  # each run computes its own prompt
    with LLM(
        here.model, draft=here.draft, draft_dtype=draft_dtype, stages=here.stages, config=config, progress=progress
    ) as llm:
        progress.stop()
        settings = {
            "max_new_tokens": here.params.max_tokens,
            "num_prompts": len(here.prompts),
            "repeats": here.repeats,
            "draft": here.draft,
            "int8_draft": here.int8_draft,
            "partition": str(llm.partition),
        }
        warm_up(llm, here.schedules, here.prompts[0])
        for temperature in temperatures:
            params = replace(here.params, temperature=temperature)
            records = run_local(
                llm, here.schedules, here.prompts, params, here.repeats,
                lambda done, t=temperature: progress(f"temperature {t:g}", done),
            )  # fmt: skip
            progress.stop()
            output.add_run(temperature, records, params.seed or 0, settings | {"temperature": temperature})
            first_prompt = first_prompt or {name: of_prompts[:1] for name, of_prompts in records.items()}
    assert first_prompt is not None
    output.add_first_prompt(first_prompt, ", forwards of the segments that came back")
    output.finish()


# --- from options to a study ---


@dataclass(frozen=True)
class _Simulated:
    """What both commands can be told of a simulation."""

    cluster_file: str
    schedule: str | None
    model: str
    draft_quality: str | None
    draft: str | None
    int8_draft: bool
    prompts: Path | None
    num_prompts: int | None
    params: SamplingParams
    as_published: bool
    no_score_order: bool
    no_prune: bool
    no_expand: bool
    tree_depth: int | None
    tree_size: int | None
    segment_len: int
    jobs: int | None
    bandwidth: float | None
    latency: float | None
    stages: int | None
    delay: float
    slow: str | None

    @property
    def overrides(self) -> dict[str, float | None]:
        return {"bandwidth_mbps": self.bandwidth, "latency_ms": self.latency, "num_stages": self.stages}

    def study(self) -> Study:
        """Raises ``UsageError``."""
        is_real = self.model != _SYNTHETIC
        if is_real and self.draft_quality is not None:
            raise UsageError(f"--draft-quality is of the synthetic model; {self.model} has --draft")
        if not is_real and self.draft is not None:
            raise UsageError("--draft is for a real model; the synthetic one has --draft-quality")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs is {self.jobs}; it must be at least 1")
        if not (math.isfinite(self.delay) and self.delay >= 0):
            raise UsageError(f"--delay is {self.delay:g}; it must be 0 or positive")
        config, cluster = self._schedule_config(), self._cluster()
        names = _schedules(self.schedule, is_simulated=True)
        if (self.no_score_order or self.no_prune or self.no_expand) and "lockstep" not in names:
            raise UsageError("--no-score-order, --no-prune and --no-expand are for lockstep, which is not to run")
        slowdown = _slowdown(self.slow, cluster.num_stages) if self.slow is not None else None
        seed = self.params.seed or 0
        prompts = wanted_prompts(self.model, self.prompts, self.num_prompts, seed)
        quality_name = self.draft_quality or _DEFAULT_QUALITY
        import torch

        from flowspec.bench.runner import PairSpec
        from flowspec.bench.study import Study
        from flowspec.launch import num_cores
        from flowspec.model.synthetic import quality
        from flowspec.simulator import Experiment, Faults

        quality(quality_name)
        torch.set_num_threads(1)  # as in the processes of other jobs
        faults, dtype = Faults(self.delay, slowdown, seed), "int8" if self.int8_draft else "auto"
        return Study(
            Experiment(cluster, config, self.params, self.as_published, faults, int8_draft=self.int8_draft),
            PairSpec(
                self.model, quality_name, self.draft or "auto", is_coupled=not self.as_published, draft_dtype=dtype
            ),
            names,
            prompts,
            num_cores() if self.jobs is None else self.jobs,
        )

    def _cluster(self) -> ClusterSpec:
        from flowspec.cluster import ClusterSpec

        cluster = ClusterSpec.load(self.cluster_file)
        if self.stages is not None:
            cluster = cluster.with_stages(self.stages)
        if self.bandwidth is not None:
            cluster = cluster.with_bandwidth(self.bandwidth)
        return cluster if self.latency is None else cluster.with_latency(self.latency)

    def _schedule_config(self) -> ScheduleConfig:
        changes: dict[str, Any] = {}
        if self.tree_depth is not None:
            changes |= {"depth": self.tree_depth, "max_depth": 2 * self.tree_depth}
        if self.tree_size is not None:
            if self.tree_size < 1:
                raise UsageError(f"--tree-size is {self.tree_size}; it must be positive")
            changes["size"] = self.tree_size + 1
        return ScheduleConfig(
            flow=replace(TreeConfig(), **changes),
            lockstep=LockstepConfig(
                replace(PUBLISHED_TREE, **changes),
                score_order=not self.no_score_order,
                prune=not self.no_prune,
                expand=not self.no_expand,
            ),
            pipeline=PipelineConfig(segment_len=self.segment_len),
        )


def _schedules(text: str | None, is_simulated: bool) -> list[str]:
    from flowspec.bench.study import check_schedules

    names = comma_list(text or COMPARED_NAMES, "--schedule")
    check_schedules(names, is_simulated)
    return names


def comma_list(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name:
            raise UsageError(f"{option} {text!r} has an empty place; write A,B,C")
        if names.count(name) > 1:
            raise UsageError(f"{option} names {name} twice")
    return names


def _client_counts(text: str) -> list[int]:
    names = comma_list(text, "--clients")
    if not all(name.isdecimal() and 0 < int(name) <= _MAX_CLIENTS for name in names):
        raise UsageError(f"--clients {text!r} is no list of counts from 1 to {_MAX_CLIENTS}, as in 1,2,4,8")
    return [int(name) for name in names]


def _simulate_load(
    study: Study,
    counts: Sequence[int],
    seed: int,
    overrides: Mapping[str, Any],
    as_json: bool,
    progress: TerminalProgress,
) -> None:
    from flowspec.bench.load import load_json, load_table, run_load
    from flowspec.bench.report import results_json

    results = run_load(study, counts, lambda done: progress("simulating", done))
    progress.stop()
    if as_json:
        settings = study.settings() | {"overrides": overrides}
        values = results_json(study.experiment.cluster.name, study.pair.name, seed, settings, [])
        write_json(values | {"results": load_json(results)})
    else:
        print_table(load_table(results))


def _temperatures(text: str) -> list[float]:
    names = comma_list(text, "--temperatures")
    try:
        temperatures = [float(name) for name in names]
    except ValueError:
        raise UsageError(f"--temperatures {text!r} is no comma list of numbers; write 0,1") from None
    for temperature in temperatures:
        SamplingParams(temperature=temperature)
    if len(set(temperatures)) < len(temperatures):
        raise UsageError(f"--temperatures {text!r} names one twice")
    return temperatures


def _slowdown(text: str, num_stages: int) -> Slowdown:
    from flowspec.simulator import Slowdown

    try:
        worker, from_s, times = text.split(":")
        slowdown = Slowdown(int(worker), float(from_s), float(times))
    except ValueError:
        raise UsageError(f"--slow {text!r} is not WORKER:FROM_S:TIMES, as in 2:1.5:3") from None
    if not 1 <= slowdown.worker <= num_stages:
        raise UsageError(f"--slow names worker {slowdown.worker}; the cluster has workers 1 to {num_stages}")
    if not (math.isfinite(slowdown.from_s) and slowdown.from_s >= 0):
        raise UsageError(f"--slow begins at {slowdown.from_s:g} s; it must be 0 or later")
    if not (math.isfinite(slowdown.times) and slowdown.times > 0):
        raise UsageError(f"--slow is {slowdown.times:g} times; it must be positive")
    return slowdown


def wanted_prompts(model: str, file: Path | None, num: int | None, seed: int) -> list[str]:
    from flowspec.bench.prompts import BUILT_IN_PROMPTS, read_prompts

    if num is not None and num < 1:
        raise UsageError(f"--num-prompts is {num}; it must be at least 1")
    if file is not None:
        return [prompt.turns[0] for prompt in read_prompts(file, num)]
    if model == _SYNTHETIC:
        return [f"{seed} {i}" for i in range(_NUM_SYNTHETIC_PROMPTS if num is None else num)]
    return list(BUILT_IN_PROMPTS[:num])


# --- figures ---


@contextlib.contextmanager
def progress_bar() -> Iterator[TerminalProgress]:
    progress = TerminalProgress()
    try:
        yield progress
    finally:
        progress.stop()


def check_place(file: Path | None) -> None:
    """Before minutes of work, not after them."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"cannot write {file}: give a file in a directory that exists")


def write_json(value: dict[str, Any]) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def _draw_throughput(path: Path, groups: dict[str, list[ScheduleResult]], title: str) -> None:
    from flowspec.bench.plots import throughput_bars

    throughput_bars(path, groups, title)


def _title(study: Study) -> str:
    experiment = study.experiment
    costs = ", as published" if experiment.as_published else ""
    costs += ", draft in int8" if experiment.int8_draft else ""
    return f"{experiment.cluster.name}, {study.pair.name}, {_counts(len(study.prompts), experiment.params)}{costs}"


def _counts(num_prompts: int, params: SamplingParams) -> str:
    return f"{num_prompts} prompts of up to {params.max_tokens} tokens"


def _driver_costs(study: Study) -> str:
    if study.experiment.as_published:
        return "driver costs: [driver.published] of the cluster file, for flow [driver.ours]"
    return "driver costs: [driver.ours] of the cluster file for all schedules"


# --- bench ---


class _Output:
    """What ``bench`` prints and writes, temperature by temperature."""

    def __init__(self, directory: Path, trace: Path | None, title: str, cluster: str | None, model: str) -> None:
        check_place(trace)
        _make_directory(directory)
        self._directory = directory
        self._trace = trace
        self._title = title
        self._cluster = cluster
        self._model = model
        self._groups: dict[str, list[ScheduleResult]] = {}
        self._values: dict[str, Any] = {"runs": []}

    def add_run(self, temperature: float, records: Records, seed: int, settings: dict[str, Any]) -> None:
        """Keep one temperature's figures and print them."""
        from flowspec.bench.plots import accepted_per_segment
        from flowspec.bench.report import results_json, results_table
        from flowspec.bench.study import ratios, results_of

        results = results_of(records)
        run = results_json(self._cluster, self._model, seed, settings, results)
        self._values["runs"].append(run | {"ratios": ratios(records, seed)})
        stdout.print(f"temperature {temperature:g}")
        print_table(results_table(results))
        stdout.print()
        if not self._groups:
            title = f"{self._title}, temperature {temperature:g}"
            accepted_per_segment(self._directory / "accepted.png", records, title)
        self._groups[f"temperature {temperature:g}"] = results

    def add_first_prompt(self, first_prompt: Records, remark: str = "") -> None:
        from flowspec.bench.study import draw_timeline, trace_runs
        from flowspec.bench.trace import write_trace

        draw_timeline(self._directory / "timeline.png", first_prompt, f"{self._title}, first prompt{remark}")
        if self._trace is not None:
            write_trace(self._trace, trace_runs(first_prompt))

    def add_sweep(self, sweep: Sweep) -> None:
        from flowspec.bench import plots

        self._values.setdefault("sweeps", {})[sweep.name] = sweep.json()
        if sweep.xs:
            path = self._directory / f"{sweep.name}.png"
            plots.sweep(path, sweep.x_label, sweep.xs, sweep.tokens_per_s, self._title, log_x=True)

    def finish(self) -> None:
        import msgspec

        from flowspec.bench.report import environment

        _draw_throughput(self._directory / "throughput.png", self._groups, self._title)
        values = {"environment": environment(), "flags": shlex.join(sys.argv[1:]), **self._values}
        path = self._directory / "results.json"
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
        stdout.print(f"figures and plots are in {self._directory}", markup=False, soft_wrap=True)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the directory {path}: {error.strerror or error}") from None
