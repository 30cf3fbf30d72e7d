"""The command ``simulate``: schedules on a cluster that is only described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowspec.cli.options import AsJson, ClusterFile, Stages, Temperature, Verbose
from flowspec.cli.study import StudyOptions, check_place, comma_list, driver_costs
from flowspec.cli.terminal import TerminalProgress, errors_in_one_line, print_table, progress_bar, stdout, write_json
from flowspec.errors import UsageError

if TYPE_CHECKING:
    from flowspec.bench.study import Study

_MAX_CLIENTS = 64
_DEFAULTS = StudyOptions()


def simulate(
    cluster_file: ClusterFile,
    options: StudyOptions = _DEFAULTS,
    temperature: Temperature = 0.0,
    stages: Stages = None,
    clients: Annotated[
        str | None, typer.Option(help="Comma list: so many requests at once on one cluster, and what that brings.")
    ] = None,
    as_json: AsJson = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Write the first prompt's work, for ui.perfetto.dev.", metavar="FILE"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the throughputs.", metavar="PNG")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw what all places did for the first prompt, some seconds.", metavar="PNG")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Compare schedules on a described cluster, in virtual time."""
    with errors_in_one_line(verbose), progress_bar() as progress:
        for path in (trace, plot, timeline):
            check_place(path)
        numbers = _client_counts(clients) if clients is not None else []
        if numbers and (trace or plot or timeline):
            raise UsageError("--clients draws nothing; leave out --trace, --plot and --timeline")
        study = options.study(cluster_file, stages, temperature or 0.0)
        overrides = options.overrides(stages)
        if numbers:
            _simulate_load(study, numbers, overrides, as_json, progress)
            return
        from flowspec.bench.report import results_cells, results_json
        from flowspec.bench.study import draw_timeline, results_of, trace_runs
        from flowspec.bench.trace import write_trace

        records = study.run(lambda done: progress("simulating", done))
        first_prompt = study.run_first_prompt() if trace or timeline else {}
        progress.stop()
        results = results_of(records)
        title = options.title(study, stages)
        if trace:
            write_trace(trace, trace_runs(first_prompt))
        if plot:
            from flowspec.bench.plots import throughput_bars

            throughput_bars(plot, {study.experiment.cluster.name: results}, title)
        if timeline:
            draw_timeline(timeline, first_prompt, f"{title}, first prompt")
        if as_json:
            settings = study.settings() | {"overrides": overrides}
            seed = study.experiment.params.seed or 0
            write_json(results_json(study.experiment.cluster.name, study.pair.name, seed, settings, results))
        else:
            print_table(results_cells(results))
            stdout.print(driver_costs(study), markup=False)


def _client_counts(text: str) -> list[int]:
    names = comma_list(text, "--clients")
    if not all(name.isdecimal() and 0 < int(name) <= _MAX_CLIENTS for name in names):
        raise UsageError(f"--clients {text!r} is no list of counts from 1 to {_MAX_CLIENTS}, as in 1,2,4,8")
    return [int(name) for name in names]


def _simulate_load(
    study: Study, numbers: Sequence[int], overrides: Mapping[str, Any], as_json: bool, progress: TerminalProgress
) -> None:
    from flowspec.bench.load import load_cells, load_json, run_load
    from flowspec.bench.report import results_json

    results = run_load(study, numbers, lambda done: progress("simulating", done))
    progress.stop()
    if as_json:
        settings = study.settings() | {"overrides": overrides}
        seed = study.experiment.params.seed or 0
        values = results_json(study.experiment.cluster.name, study.pair.name, seed, settings, [])
        write_json(values | {"results": load_json(results)})
    else:
        print_table(load_cells(results))
