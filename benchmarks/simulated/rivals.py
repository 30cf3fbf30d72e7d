"""Sections that compare ``flow`` with the other schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flowspec.bench import plots
from flowspec.bench.report import markdown_table
from flowspec.config import LockstepConfig, ScheduleConfig
from flowspec.emulation.description import ClusterDescription
from flowspec.request.records import ScheduleResult
from flowspec.schedule.catalogue import SCHEDULES
from simulated.lab import AGX_7B, NANO_7B, NANO_13B, Case, Lab, all_clusters, cluster
from simulated.text import best_rival, code, command, image, interval, ratio_text, speed

TARGETS = (NANO_7B, AGX_7B, NANO_13B, "7b-agx-8", "7b-weak-compute", "7b-agx-wan-20ms", "7b-agx-wan-50ms")
DRAWN = (NANO_7B, AGX_7B, "7b-agx-8", "7b-agx-wan-20ms")  # clusters of the bar plot


def engine(lab: Lab) -> str:
    """Every schedule on every cluster with the same costs."""
    schedules = (*SCHEDULES, "flow-no-hints")
    parts = [
        "All schedules in the same engine, with the driver's costs of this package, greedy. In brackets: 95 % interval "
        "of a paired bootstrap over prompts. Hints are a part of `flow` that no other schedule could use; the last "
        "column is without them."
    ]
    for quality in ("eagle1", "eagle3"):
        clusters = sorted(all_clusters(), key=lambda c: (c.name not in TARGETS, c.name))
        cases = [
            Case(c, schedules, quality=quality, num_prompts=0 if c.name in TARGETS else lab.options.few)
            for c in clusters
        ]
        all_runs = {case.cluster.name: runs for case, runs in zip(cases, lab.run(cases), strict=True)}
        results = {name: [ScheduleResult.of(*item) for item in runs.items()] for name, runs in all_runs.items()}
        rows: list[list[str]] = []
        for name, runs in all_runs.items():
            best = best_rival(runs)
            speeds = [f"{result.tokens_per_s:.2f}" for result in results[name]]
            ratios = [interval(runs, "flow", best), interval(runs, "flow-no-hints", best)]
            rows.append([name, str(len(runs["flow"])), *speeds, best, *ratios])
        headers = ["cluster", "prompts", *SCHEDULES, "flow, no hints", "best other", "flow / best", "no hints / best"]
        parts += [f"Draft `{quality}`, tokens/s:", markdown_table(headers, rows)]
        parts += [code(f"{command(cases[0], lab.options)}  # the first row")]
        if quality == "eagle1":
            title = "Simulated decode rate, draft eagle1, same engine, greedy"
            drawn = {name: [r for r in results[name] if r.schedule in SCHEDULES] for name in DRAWN}
            plots.throughput_bars(lab.plot_path("throughput"), drawn, title)
            title = f"What became of segments: {NANO_7B}, draft eagle1, same engine, greedy"
            records = {name: all_runs[NANO_7B][name] for name in ("chunked", "pipedec", "lockstep", "flow")}
            plots.accepted_per_segment(lab.plot_path("accepted"), records, title)
    parts += [image("throughput", "tokens per second by cluster"), image("accepted", "accepted nodes per segment")]
    return "\n\n".join(parts)


def tuned(lab: Lab) -> str:
    """Rivals with the best settings for each cluster and draft."""
    few = lab.options.few
    settings = {
        "lockstep": [
            (f"{size} nodes, +{expand}, depth {depth}", with_tree(size, depth, expand))
            for size in (40, 80, 160, 300) for expand in (16, 32, 64, 120) for depth in (3, 4, 6, 8)
        ],
        "serial": [
            (f"{size} nodes, depth {depth}", with_tree(size, depth, 64))
            for size in (16, 32, 64, 80, 128) for depth in (4, 6, 8, 10)
        ],
    }  # fmt: skip
    rows: list[list[str]] = []
    for quality in ("eagle1", "eagle3"):
        for name in TARGETS:
            spec = cluster(name)
            row = [name, quality]
            flow = lab.run([Case(spec, ("flow", "flow-no-hints"), quality=quality, num_prompts=few)])[0]
            for schedule, choices in settings.items():
                trials = [
                    Case(spec, (schedule,), quality=quality, config=config, num_prompts=2, flags=text)
                    for text, config in choices
                ]
                speeds = [speeds[schedule] for speeds in lab.speeds(trials)]
                chosen = trials[speeds.index(max(speeds))]
                rival = lab.run([replace(chosen, num_prompts=few)])[0][schedule]
                row += [chosen.flags, f"{speed(rival):.2f}"]
                row += [ratio_text(flow[ours], rival) for ours in ("flow", "flow-no-hints")]
            rows.append(row)
    headers = ["cluster", "draft"]
    for schedule in settings:
        headers += [f"{schedule} tuned", "tokens/s", "flow / it", "no hints / it"]
    return "\n\n".join(
        [
            "The rivals' settings were searched for every cluster and draft, on 2 of the prompts, by tokens/s: "
            "`lockstep` over 64 of them (nodes of the first tree, nodes of an expansion, depth), `serial` over 20. "
            f"`flow` has no settings for clusters. Same engine, greedy, {few} prompts.",
            markdown_table(headers, rows),
            code("python benchmarks/results.py --only tuned"),
        ]
    )


def with_tree(size: int, depth: int, expand_size: int) -> ScheduleConfig:
    tree = replace(LockstepConfig().tree, size=size + 1, depth=depth)
    return ScheduleConfig(lockstep=LockstepConfig(tree, depth, expand_size))


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


def whole(lab: Lab) -> str:
    """``flow`` as one would run it today against FlowSpec as published."""
    clusters = sorted(all_clusters(), key=lambda c: (c.name not in TARGETS, c.name))
    nums = {c.name: lab.options.num_prompts if c.name in TARGETS else lab.options.few for c in clusters}
    theirs = [Case(c, ("lockstep",), as_published=True, num_prompts=nums[c.name]) for c in clusters]
    ours = [
        Case(c, ("flow",), quality="eagle3", int8_draft=True, num_prompts=nums[c.name], flags="--draft-dtype int8")
        for c in clusters
    ]
    rows: list[list[str]] = []
    for spec, old, new in zip(clusters, lab.run(theirs), lab.run(ours), strict=True):
        lockstep, flow = old["lockstep"], new["flow"]
        row = [spec.name, nums[spec.name], f"{speed(lockstep):.2f}", f"{speed(flow):.2f}", ratio_text(flow, lockstep)]
        rows.append([str(cell) for cell in row])
    return "\n\n".join(
        [
            "Schedule, engine and draft together: `flow` with this package's costs, draft `eagle3` in int8, and hints, "
            "against `lockstep` with the published costs and draft `eagle1`; greedy. The two drafts belong to "
            "different texts, so these are ratios of total throughputs, and the interval pairs texts that have "
            "nothing in common.",
            markdown_table(["cluster", "prompts", "lockstep as published", "flow", "ratio"], rows),
            code(*(f"{command(case, lab.options)}  # the first row" for case in (theirs[0], ours[0]))),
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
