"""Sections that compare ``flow`` with the other schedules."""

from __future__ import annotations

from collections.abc import Sequence

from flowspec.bench import plots
from flowspec.bench.report import markdown_table
from flowspec.emulation.description import ClusterDescription
from flowspec.request.records import ScheduleResult
from flowspec.schedule.catalogue import SCHEDULES
from simulated.lab import AGX_7B, NANO_7B, Case, Lab, all_clusters, cluster
from simulated.text import best_rival, code, command, image, interval, speed

QUALITIES = ("eagle1", "eagle3")
DRAWN = (NANO_7B, AGX_7B, "7b-agx-8", "7b-agx-wan-20ms")  # clusters of the bar plot


def engine(lab: Lab) -> str:
    """Every schedule with its default settings on every cluster, with the same costs."""
    schedules, few = (*SCHEDULES, "flow-no-hints"), lab.options.few
    parts = [
        "All schedules with their default settings in the same engine, with the driver's costs of this package, "
        f"greedy, {few} prompts; tokens/s. The rivals' best settings are in the section before. Hints are a part of "
        "`flow` that no other schedule could use; the last column is without them."
    ]
    for quality in QUALITIES:
        cases = [Case(spec, schedules, quality=quality, num_prompts=few) for spec in all_clusters()]
        all_runs = {case.cluster.name: runs for case, runs in zip(cases, lab.run(cases), strict=True)}
        rows = [[name, *(f"{speed(records):.2f}" for records in runs.values())] for name, runs in all_runs.items()]
        parts += [f"Draft `{quality}`:", markdown_table(["cluster", *SCHEDULES, "flow, no hints"], rows)]
        parts += [code(f"{command(cases[0], lab.options)}  # the first row")]
        if quality == "eagle1":
            title = "Simulated decode rate, draft eagle1, default settings, same engine, greedy"
            drawn = {
                name: [ScheduleResult.of(*item) for item in all_runs[name].items() if item[0] in SCHEDULES]
                for name in DRAWN
            }
            plots.throughput_bars(lab.plot_path("throughput"), drawn, title)
            title = f"What became of segments: {NANO_7B}, draft eagle1, same engine, greedy"
            records = {name: all_runs[NANO_7B][name] for name in ("chunked", "pipedec", "lockstep", "flow")}
            plots.accepted_per_segment(lab.plot_path("accepted"), records, title)
    parts += [image("throughput", "tokens per second by cluster"), image("accepted", "accepted nodes per segment")]
    return "\n\n".join(parts)


def demo(lab: Lab) -> str:
    """Real tokens: the demo pair on emulated devices."""
    less = ("flow-no-hints", "flow-no-ngrams")
    schedules = (*SCHEDULES, *less)
    rows: list[list[str]] = []
    cases = [
        Case(cluster(name), schedules, model="demo", temperature=temperature, num_prompts=lab.options.few)
        for temperature in (0.0, 0.8) for name in (NANO_7B, AGX_7B, "7b-agx-8")
    ]  # fmt: skip
    for case, runs in zip(cases, lab.run(cases), strict=True):
        best = best_rival(runs)
        row = [
            case.cluster.name,
            f"{case.temperature:g}",
            *(f"{speed(records):.2f}" for records in runs.values()),
            best,
        ]
        rows.append([*row, interval(runs, "flow", best), *(interval(runs, name, "flow") for name in less)])
    headers = ["cluster", "temperature", *SCHEDULES, "no hints", "no n-grams", "best other", "flow / best"]
    headers += ["no hints / flow", "no n-grams / flow"]
    return "\n\n".join(
        [
            "The demo pair's own tokens, draft and hints, with the costs of the emulated model; all schedules give the "
            f"same tokens. Tokens/s, same engine, {lab.options.few} prompts.",
            markdown_table(headers, rows),
            code(f"{command(cases[0], lab.options)}  # the first row"),
        ]
    )


def stages(lab: Lab) -> str:
    """The same model over more and more devices."""
    spec = cluster(AGX_7B)
    nums = (2, 4, 8, 16, 32)
    return sweep(lab, "stages", "stages", nums, [spec.with_stages(num) for num in nums], "--stages")


def latency(lab: Lab) -> str:
    """The same devices further and further apart."""
    spec = cluster(AGX_7B)
    all_ms = (0.3, 2, 5, 20, 50)
    return sweep(lab, "latency", "latency of a hop, ms", all_ms, [spec.with_latency(ms) for ms in all_ms], "--latency")


def sweep(
    lab: Lab, section: str, label: str, values: Sequence[float], clusters: Sequence[ClusterDescription], flag: str
) -> str:
    schedules, few = ("serial", "lockstep", "flow"), lab.options.few
    cases = [
        Case(spec, schedules, num_prompts=few, flags=f"{flag} {value:g}")
        for value, spec in zip(values, clusters, strict=True)
    ]
    all_runs = lab.run(cases)
    series = {name: [ScheduleResult.of(name, runs[name]).tokens_per_s for runs in all_runs] for name in schedules}
    rows = [[name, *(f"{speed:.2f}" for speed in speeds)] for name, speeds in series.items()]
    rows.append(["flow / lockstep", *(interval(runs, "flow", "lockstep") for runs in all_runs)])
    title = f"{AGX_7B}, draft eagle1, same engine, greedy"
    plots.sweep(lab.plot_path(section), label, values, series, title, log_x=True)
    return "\n\n".join(
        [
            f"{AGX_7B}, draft `eagle1`, same engine, greedy, {few} prompts; tokens/s by {label}.",
            markdown_table(["schedule", *(f"{value:g}" for value in values)], rows),
            code(f"{command(cases[0], lab.options)}  # the first column"),
            image(section, f"tokens per second by {label}"),
        ]
    )
