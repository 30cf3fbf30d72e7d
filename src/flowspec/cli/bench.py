"""The command ``bench``: schedules x prompts x temperatures, simulated or on this machine, as figures and plots."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowspec.cli.groups import changed
from flowspec.cli.options import (
    DEFAULT_STAGE_OPTIONS,
    DraftCheckOption,
    DraftDtype,
    DraftLayersOption,
    DraftWorkerOption,
    Dtype,
    OnOff,
    StageOptions,
    Verbose,
)
from flowspec.cli.study import (
    SYNTHETIC,
    StudyOptions,
    check_place,
    comma_list,
    counts,
    driver_costs,
    schedule_names,
    wanted_prompts,
)
from flowspec.cli.terminal import TerminalProgress, errors_in_one_line, print_table, progress_bar, stdout
from flowspec.cli.values import draft_layers as layers_of
from flowspec.config import EngineConfig, ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.errors import UsageError

if TYPE_CHECKING:
    from flowspec.bench.study import Records, Study, Sweep
    from flowspec.request.records import ScheduleResult

_DEFAULTS = StudyOptions()
# Options of a study that mean something in real time too.
_HERE_TOO = {"--schedule", "--model", "--draft", "--draft-dtype", "--prompts", "--num-prompts", "--max-new-tokens"}
_HERE_TOO |= {"--seed", "--tree-top-k", "--tree-depth", "--tree-size", "--min-probability", "--segment-len"}


def bench(
    cluster_file: Annotated[
        str | None,
        typer.Argument(
            metavar="CLUSTER.toml",
            help="Simulate this cluster; without one, run in real time, here or over --workers.",
            show_default=False,
        ),
    ] = None,
    options: StudyOptions = _DEFAULTS,
    temperatures: Annotated[str, typer.Option(help="Comma list; 0 is greedy.")] = "0,1",
    stage_options: StageOptions = DEFAULT_STAGE_OPTIONS,
    draft_layers: DraftLayersOption = None,
    draft_check: DraftCheckOption = OnOff.on,
    draft_worker: DraftWorkerOption = None,
    repeats: Annotated[int, typer.Option(help="Runs of each prompt in real time; the median one is kept.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the files go.", metavar="DIR")] = Path("bench-results"),
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Vary the cluster's bandwidth, latency and stages too.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Write the first prompt's work, for ui.perfetto.dev.", metavar="FILE"),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Measure schedules, simulated or in real time."""
    with errors_in_one_line(verbose), progress_bar() as progress:
        all_temperatures, stages = _temperatures(temperatures), stage_options.stages
        if cluster_file is not None:
            here_only = ["--repeats"] * (repeats != 1) + ["--draft-layers"] * (draft_layers is not None)
            here_only += ["--draft-check"] * (draft_check is not OnOff.on)
            here_only += ["--draft-worker"] * (draft_worker is not None)
            here_only += changed(replace(stage_options, stages=None), DEFAULT_STAGE_OPTIONS)
            if here_only:
                raise UsageError(f"{here_only[0]} is for runs in real time; leave it or the cluster file out")
            study = options.study(cluster_file, stages)
            title = options.title(study, stages, "temperature")
            output = _Output(out, trace, title, study.experiment.cluster.name, study.pair.name)
            _bench_simulated(output, study, options, stages, all_temperatures, sweep, progress)
            return
        simulated = [option for option in changed(options, _DEFAULTS) if option not in _HERE_TOO]
        if simulated := ["--sweep"] * sweep + simulated:
            raise UsageError(f"{simulated[0]} is for the simulator; name a cluster file too")
        if repeats < 1:
            raise UsageError(f"--repeats is {repeats}; it must be at least 1")
        here = _Here.of(options, stage_options, repeats, layers_of(draft_layers), draft_check, draft_worker)
        _bench_here(_Output(out, trace, here.title, None, here.model), here, all_temperatures, progress)


def _bench_simulated(
    output: _Output,
    study: Study,
    options: StudyOptions,
    stages: int | None,
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
        output.add_run(temperature, records, seed, at.settings() | {"overrides": options.overrides(stages)})
    stdout.print(driver_costs(study), markup=False)
    first = study.with_temperature(temperatures[0])
    output.add_first_prompt(temperatures[0], first.run_first_prompt())
    for name in SWEEPS if sweeps else ():
        sweep = run_sweep(first, name, lambda done, name=name: progress(f"sweep of {name}", done))
        progress.stop()
        output.add_sweep(sweep, options.title(first, stages, varied=name))
    output.finish()


@dataclass(frozen=True)
class _Here:
    """What is measured in real time, on this machine or over workers elsewhere."""

    model: str
    draft: str
    draft_dtype: DraftDtype
    draft_layers: list[int] | None
    draft_check: OnOff
    stage_options: StageOptions
    arguments: dict[str, Any]  # of ``LLM``, by ``stage_options``
    schedule_config: ScheduleConfig
    trees: list[str]  # what is to be said of them
    schedules: list[str]
    prompts: list[str]
    params: SamplingParams
    repeats: int

    @classmethod
    def of(
        cls,
        options: StudyOptions,
        stage_options: StageOptions,
        repeats: int,
        draft_layers: list[int] | None,
        draft_check: OnOff,
        draft_worker: str | None,
    ) -> _Here:
        """Raises ``UsageError``."""
        model = "demo" if options.model is None else options.model
        if model == SYNTHETIC:
            raise UsageError("the synthetic model is for the simulator; name a cluster file too, or another model")
        params = options.params()
        return cls(
            model,
            "auto" if options.draft is None else options.draft,
            options.draft_dtype,
            draft_layers,
            draft_check,
            stage_options,
            stage_options.arguments(draft_worker),
            options.schedule_config(),
            options.tree_title(),
            schedule_names(options.schedule, is_simulated=False),
            wanted_prompts(model, options.prompts, options.num_prompts, params.seed or 0),
            params,
            repeats,
        )

    @property
    def title(self) -> str:
        workers = self.arguments["workers"]
        where = "this machine" if workers is None else f"{len(workers)} workers"
        parts = [self.model, where, counts(len(self.prompts), self.params)]
        parts += [self.stage_options.dtype.value] * (self.stage_options.dtype != Dtype.float32)
        parts += [f"draft in {self.draft_dtype.value}"] * (self.draft_dtype != DraftDtype.auto)
        parts += ["int8 between the workers"] * self.stage_options.int8_wire
        parts += [f"{self.stage_options.stages} stages"] * (self.stage_options.stages is not None)
        parts += [f"layers {self.arguments['partition']}"] * (self.arguments["partition"] is not None)
        return ", ".join(parts + self.trees)


def _bench_here(output: _Output, here: _Here, temperatures: Sequence[float], progress: TerminalProgress) -> None:
    from flowspec.bench.local import run_local, warm_up
    from flowspec.llm import LLM

    first_prompt: Records | None = None
    config = EngineConfig(keeps_caches=False, memory_tokens=0)  # each run computes its own prompt
    with LLM(
        here.model,
        draft=here.draft,
        draft_dtype=here.draft_dtype.value,
        draft_layers=here.draft_layers,
        draft_check=here.draft_check.value,
        schedule_config=here.schedule_config,
        config=config,
        progress=progress,
        **here.arguments,
    ) as llm:
        progress.stop()
        settings = {
            "max_new_tokens": here.params.max_tokens,
            "num_prompts": len(here.prompts),
            "repeats": here.repeats,
            "draft": here.draft,
            "draft_layers": here.draft_layers,
            "draft_dtype": here.draft_dtype.value,
            "schedule_config": asdict(here.schedule_config),
            "workers": here.arguments["workers"],
            "draft_worker": here.arguments["draft_worker"],
            "partition": str(llm.partition),
            "dtype": here.stage_options.dtype.value,
            "device": here.stage_options.device,
            "int8_wire": here.stage_options.int8_wire,
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
    output.add_first_prompt(temperatures[0], first_prompt, ", forwards of the segments that came back")
    output.finish()


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
        from flowspec.bench.report import results_cells, results_json
        from flowspec.bench.study import ratios, results_of

        results = results_of(records)
        run = results_json(self._cluster, self._model, seed, settings, results)
        self._values["runs"].append(run | {"ratios": ratios(records, seed)})
        stdout.print(f"temperature {temperature:g}")
        print_table(results_cells(results))
        stdout.print()
        if not self._groups:
            title = f"{self._title}, temperature {temperature:g}"
            accepted_per_segment(self._directory / "accepted.png", records, title)
        self._groups[f"temperature {temperature:g}"] = results

    def add_first_prompt(self, temperature: float, first_prompt: Records, remark: str = "") -> None:
        from flowspec.bench.study import draw_timeline, trace_runs
        from flowspec.bench.trace import write_trace

        title = f"{self._title}, temperature {temperature:g}, first prompt{remark}"
        draw_timeline(self._directory / "timeline.png", first_prompt, title)
        if self._trace is not None:
            write_trace(self._trace, trace_runs(first_prompt))

    def add_sweep(self, sweep: Sweep, title: str) -> None:
        """Keep the figures of a sweep, print and draw them."""
        from flowspec.bench import plots

        self._values.setdefault("sweeps", {})[sweep.name] = sweep.json()
        if sweep.xs:
            path = self._directory / f"{sweep.name}.png"
            plots.sweep(path, sweep.x_label, sweep.xs, sweep.tokens_per_s, title, log_x=True)
            stdout.print(f"\ntokens/s by {sweep.x_label}", markup=False)
            print_table(sweep.cells())

    def finish(self) -> None:
        import msgspec

        from flowspec.bench.plots import throughput_bars
        from flowspec.bench.report import environment

        throughput_bars(self._directory / "throughput.png", self._groups, self._title)
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
