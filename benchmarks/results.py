"""Runs every simulation of docs/RESULTS.md and writes it there, with JSON and plots in docs/results.

    python benchmarks/results.py [--only SECTION] [--num-prompts 40] [--jobs 2]

Each section below is one table; docs/METHODOLOGY.md defines the figures. The same numbers come out on every run. What
several sections need is simulated once, and where a section takes fewer prompts they are the first ones of the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flowspec.bench import plots
from flowspec.bench.prompts import BUILT_IN_PROMPTS
from flowspec.bench.report import markdown_table, ratio_interval, results_json
from flowspec.bench.runner import SYNTHETIC, PairSpec, simulate_piece
from flowspec.bench.study import draw_timeline
from flowspec.config import LockstepConfig, ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.emulation.description import ClusterSpec, DriverCosts
from flowspec.emulation.experiment import TENSOR_PARALLEL, Experiment
from flowspec.request.records import RequestRecord, ScheduleResult
from flowspec.schedule.catalogue import ABLATIONS, SCHEDULES

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"
SEED = 0
DEFAULTS = ScheduleConfig()
PIECE = 5  # prompts that a process simulates at once

NANO_7B, NANO_13B, AGX_7B = "7b-nano-150m", "13b-4bit-nano-150m", "7b-agx-1g"
NANOS = (NANO_7B, NANO_13B)
TARGETS = (NANO_7B, AGX_7B, NANO_13B, "7b-agx-8", "7b-weak-compute", "7b-agx-wan-20ms", "7b-agx-wan-50ms")
RIVALS = ("ar", "serial", "chunked", "pipedec", "lockstep")
DRAWN = (NANO_7B, AGX_7B, "7b-agx-8", "7b-agx-wan-20ms")  # clusters of the bar plot
PUBLISHED = ("chunked", "pipedec", "lockstep", "serial", "ar")

# (cluster, temperature) -> schedule -> tokens/s with Llama-2 and Vicuna, means over six data sets (arXiv 2507.02620).
PAPER = {
    (NANO_7B, 0.0): {
        "chunked": (6.08, 6.26), "pipedec": (7.03, 7.16), "lockstep": (8.70, 8.96),
        "tp-megatron": (2.02, 2.07), "tp-galaxy": (2.10, 2.14),
    },
    (NANO_13B, 0.0): {"chunked": (1.31, 1.33), "pipedec": (1.59, 1.60), "lockstep": (2.21, 2.23)},
    (NANO_7B, 1.0): {
        "chunked": (5.78, 5.42), "pipedec": (7.02, 6.86), "lockstep": (8.38, 8.01),
        "tp-megatron": (1.93, 1.79), "tp-galaxy": (2.00, 1.88),
    },
    (NANO_13B, 1.0): {"chunked": (1.26, 1.16), "pipedec": (1.60, 1.55), "lockstep": (2.14, 1.96)},
}  # fmt: skip
PAPER_LOSS = {"lockstep": -7.2, "pipedec": -5.9, "chunked": -5.8, "tp-megatron": -57.0, "tp-galaxy": -66.0}  # per cent

Runs = dict[str, list[RequestRecord]]  # by schedule, in the order of the prompts


@dataclass(frozen=True)
class Case:
    """Some schedules under the same conditions."""

    cluster: ClusterSpec
    schedules: tuple[str, ...]
    as_published: bool = False
    quality: str = "eagle1"
    temperature: float = 0.0
    config: ScheduleConfig = DEFAULTS
    num_prompts: int = 0  # 0: all
    model: str = SYNTHETIC
    int8_draft: bool = False  # the driver's draft head
    flags: str = ""  # how the cluster or the configuration differs, as flags of ``flowspec simulate``

    @property
    def pair(self) -> PairSpec:
        return PairSpec(self.model, self.quality)


@dataclass(frozen=True)
class Options:
    num_prompts: int
    max_new_tokens: int
    out: Path

    @property
    def half(self) -> int:
        """Prompts of sections that add a variation to another one."""
        return max(2, self.num_prompts // 2)

    @property
    def few(self) -> int:
        """Prompts of sections with many configurations."""
        return max(2, self.num_prompts // 5)


@dataclass(frozen=True)
class Piece:
    """What one process simulates at once."""

    experiment: Experiment
    pair: PairSpec
    schedule: str
    prompts: range


def run_piece(piece: Piece) -> list[RequestRecord]:
    """On the texts of ``flowspec simulate``."""
    is_synthetic = piece.pair.model == SYNTHETIC
    texts = [f"{SEED} {index}" for index in range(piece.prompts.stop)] if is_synthetic else BUILT_IN_PROMPTS
    prompts = [(index, texts[index % len(texts)]) for index in piece.prompts]
    return simulate_piece(piece.experiment, piece.pair, piece.schedule, prompts)


class Lab:
    """Simulates what was not simulated yet, on all processes, and notes what a section has used."""

    def __init__(self, options: Options, pool: ProcessPoolExecutor | None) -> None:
        self.options = options
        self.used: list[tuple[Case, Runs]] = []  # by the section at work
        self._map = pool.map if pool else map
        self._records: dict[tuple[Experiment, PairSpec, str], list[RequestRecord]] = {}

    def run(self, cases: Sequence[Case]) -> list[Runs]:
        """The records of every case."""
        cases = [replace(case, num_prompts=case.num_prompts or self.options.num_prompts) for case in cases]
        pieces = list(dict.fromkeys(piece for case in cases for piece in self._missing(case)))
        for done, (piece, records) in enumerate(zip(pieces, self._map(run_piece, pieces), strict=True), 1):
            self._records.setdefault((piece.experiment, piece.pair, piece.schedule), []).extend(records)
            print(f"  {done}/{len(pieces)} {piece.experiment.cluster.name} {piece.schedule}", file=sys.stderr)
        runs = [
            {name: self._records[self._key(case, name)][: case.num_prompts] for name in case.schedules}
            for case in cases
        ]
        self.used += zip(cases, runs, strict=True)
        return runs

    def speeds(self, cases: Sequence[Case]) -> list[dict[str, float]]:
        """Tokens per second of every case, by schedule."""
        return [
            {name: ScheduleResult.of(name, records).tokens_per_s for name, records in runs.items()}
            for runs in self.run(cases)
        ]

    def _key(self, case: Case, schedule: str) -> tuple[Experiment, PairSpec, str]:
        params = SamplingParams(self.options.max_new_tokens, case.temperature, seed=SEED)
        as_published = case.as_published and not schedule.startswith("flow")  # which has its own costs in any case
        experiment = Experiment(case.cluster, case.config, params, as_published, int8_draft=case.int8_draft)
        return experiment, case.pair, schedule

    def _missing(self, case: Case) -> Iterator[Piece]:
        for schedule in case.schedules:
            key = self._key(case, schedule)
            for start in range(len(self._records.get(key, ())), case.num_prompts, PIECE):
                yield Piece(*key, range(start, min(start + PIECE, case.num_prompts)))

    def plot_path(self, name: str) -> Path:
        return self.options.out / "results" / f"{name}.png"


def cluster(name: str) -> ClusterSpec:
    return ClusterSpec.load(ROOT / "clusters" / f"{name}.toml")


def all_clusters() -> list[ClusterSpec]:
    return [ClusterSpec.load(path) for path in sorted((ROOT / "clusters").glob("*.toml"))]


def command(case: Case, options: Options) -> str:
    """What gives the figures of one case."""
    parts = [f"flowspec simulate clusters/{case.cluster.name}.toml --schedule {','.join(case.schedules)}"]
    parts += [f"--model {case.model}"] if case.model != SYNTHETIC else []
    parts += ["--as-published"] * case.as_published
    parts += [f"--draft-quality {case.quality}"] if case.quality != "eagle1" else []
    parts += [f"--temperature {case.temperature:g}"] if case.temperature else []
    parts += [case.flags] if case.flags else []
    parts += [f"--num-prompts {case.num_prompts or options.num_prompts} --max-new-tokens {options.max_new_tokens}"]
    return " ".join(parts)


def code(*commands: str) -> str:
    return "\n".join(["```sh", *commands, "```"])


def image(name: str, text: str) -> str:
    return f"![{text}](results/{name}.png)"


def per_cent(value: float, than: float) -> str:
    return f"{100 * (value / than - 1):+.1f} %"


def interval(runs: Runs, above: str, below: str) -> str:
    return ratio_text(runs[above], runs[below])


def ratio_text(above: Sequence[RequestRecord], below: Sequence[RequestRecord]) -> str:
    ratio, low, high = ratio_interval(above, below)
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"


def speed(records: Sequence[RequestRecord]) -> float:
    return ScheduleResult.of("", records).tokens_per_s


def best_rival(runs: Runs) -> str:
    return max(RIVALS, key=lambda name: speed(runs[name]))


# One function for each section of the page.


def published(lab: Lab) -> str:
    """The paper's schedules with the costs of the paper's code, greedy."""
    return compare_with_paper(lab, 0.0, lab.options.num_prompts)


def temperature(lab: Lab) -> str:
    """The same, sampled."""
    return compare_with_paper(lab, 1.0, lab.options.half)


def compare_with_paper(lab: Lab, temperature: float, num_prompts: int) -> str:
    cases: list[Case] = []
    for name in NANOS:
        case = Case(cluster(name), PUBLISHED, as_published=True, temperature=temperature, num_prompts=num_prompts)
        wired = cluster(name).with_bandwidth(1000)
        cases += [case, replace(case, cluster=wired, schedules=TENSOR_PARALLEL, flags="--bandwidth 1000")]
    rows: list[list[str]] = []
    near: list[str] = []
    far: list[str] = []
    chunked = 1.0  # of the same cluster: its tensor parallel case comes second
    for case, speeds in zip(cases, lab.speeds(cases), strict=True):
        name, paper = case.cluster.name, PAPER[case.cluster.name, temperature]
        chunked, paper_chunked = speeds.get("chunked", chunked), sum(paper["chunked"])
        for schedule, speed in speeds.items():
            row = [name, schedule, f"{speed:.2f}", f"{speed / chunked:.2f}"]
            if schedule not in paper:
                rows.append([*row, "", "", ""])
                continue
            mean = sum(paper[schedule]) / 2
            deviation = per_cent(speed, mean)
            ratio = f"{sum(paper[schedule]) / paper_chunked:.2f}"
            rows.append([*row, " / ".join(f"{value:.2f}" for value in paper[schedule]), ratio, deviation])
            (near if abs(speed / mean - 1) <= 0.1 else far).append(f"{schedule} on {name} ({deviation})")
    headers = ["cluster", "schedule", "tokens/s", "x chunked", "paper: Llama-2 / Vicuna", "x chunked", "deviation"]
    return "\n\n".join(
        [
            f"Temperature {temperature:g}, draft `eagle1`, the published driver's costs, {num_prompts} prompts. The "
            "paper's column is its mean over six data sets; the deviation is from the mean of its two models. The "
            "tensor parallel rows are at 1000 Mbps, where the paper's bandwidth sweep has its main table's values.",
            markdown_table(headers, rows),
            f"Within 10 % of the paper: {', '.join(near) or 'nothing'}. Further off: {', '.join(far) or 'nothing'}.",
            code(*(command(case, lab.options) for case in cases)),
        ]
    )


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
    return ScheduleConfig(lockstep=LockstepConfig(tree, depth, expand_size, min(48, expand_size)))


def parts(lab: Lab) -> str:
    """What each part of ``flow`` is worth."""
    # The synthetic language hardly ever repeats itself: what n-grams are worth is shown with the demo pair.
    schedules = ("flow", *(n for n in ABLATIONS if n.startswith("flow") and n != "flow-no-ngrams"))
    names = (NANO_7B, NANO_13B, "7b-agx-8", "7b-weak-compute", "7b-agx-wan-20ms")
    cases = [
        Case(cluster(name), schedules, quality=quality, num_prompts=lab.options.few)
        for quality in ("eagle1", "eagle3") for name in names
    ]  # fmt: skip
    rows = [
        [
            case.cluster.name,
            case.quality,
            f"{speed(runs['flow']):.2f}",
            *(interval(runs, n, "flow") for n in schedules[1:]),
        ]
        for case, runs in zip(cases, lab.run(cases), strict=True)
    ]
    return "\n\n".join(
        [
            f"`flow` without one of its parts at a time, against the whole; same engine, greedy, {lab.options.few} "
            "prompts.",
            markdown_table(["cluster", "draft", "flow, tokens/s", *schedules[1:]], rows),
            code(f"{command(cases[0], lab.options)}  # the first row"),
        ]
    )


def bound(lab: Lab) -> str:
    """How far ``flow`` is from what its pipeline could give."""
    few = lab.options.few
    rows: list[list[str]] = []
    bars: dict[str, dict[str, float]] = {}
    for quality in ("eagle1", "eagle3"):
        for spec in all_clusters():
            free = replace(spec, ours=DriverCosts(0.0, 0.0, 0.0, hop_ms=spec.ours.hop_ms))
            actual = Case(spec, ("flow",), quality=quality, num_prompts=few)
            no_driver = replace(actual, cluster=free, flags="free driver")
            oracle = replace(no_driver, quality=f"{quality}-oracle", flags="free driver, oracle")
            all_ms = [1e3 / speeds["flow"] for speeds in lab.speeds([actual, no_driver, oracle])]
            useful, wasted = busy_shares(lab, oracle)
            losses = {
                "useful forwards": all_ms[2] * useful,
                "wasted forwards": all_ms[2] * wasted,
                "waiting": all_ms[2] * (1 - useful - wasted),
                "misses": all_ms[1] - all_ms[2],
                "driver": all_ms[0] - all_ms[1],
            }
            bars[f"{spec.name}\n{quality}"] = losses
            share = f"{100 * all_ms[2] / all_ms[0]:.0f} %"
            rows.append([spec.name, quality, f"{1e3 / all_ms[0]:.2f}", f"{1e3 / all_ms[2]:.2f}", share])
            rows[-1] += [f"{ms:.1f}" for ms in losses.values()]
    title = "Time per token of flow, by what it is spent on; greedy, same engine"
    plots.stacked(lab.plot_path("bound"), bars, "ms per token, as a share of the whole", title)
    headers = [
        "cluster",
        "draft",
        "flow, tokens/s",
        "bound",
        "share",
        "useful",
        "wasted",
        "waiting",
        "misses",
        "driver",
    ]
    return "\n\n".join(
        [
            "The bound is `flow` with a driver whose work takes no time, and a draft whose list of children always "
            "contains the target's token, though not always first. What `flow` takes more than that is parted into "
            "the driver's work (what is gained when it is free) and misses (what is gained by the oracle's draft); the "
            "bound's own time into forwards of the busiest stage with and without an accepted row, and the rest of its "
            f"time, in which it waits. Milliseconds per token; greedy, {few} prompts.",
            markdown_table(headers, rows),
            code("python benchmarks/results.py --only bound"),
            image("bound", "time per token by what it is spent on"),
        ]
    )


def busy_shares(lab: Lab, case: Case) -> tuple[float, float]:
    """Of the busiest stage's time on the first prompt: forwards with an accepted row, and all its other work."""
    params = SamplingParams(lab.options.max_new_tokens, seed=SEED)
    experiment = Experiment(case.cluster, case.config, params, with_spans=True)
    record = run_piece(Piece(experiment, case.pair, "flow", range(1)))[0]
    accepted = {segment.segment_id for segment in record.segment_records if segment.num_accepted}
    busiest, start_s = 1 + int(np.argmax(record.busy_s[1:])), record.emissions.decode_start_s
    useful = sum(
        min(span.end_s, record.end_s) - span.start_s
        for span in record.spans
        if span.place == busiest and span.segment_id in accepted and start_s <= span.start_s < record.end_s
    )
    return useful / record.decode_s, record.busy_s[busiest] / record.decode_s - useful / record.decode_s


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


def bandwidth(lab: Lab) -> str:
    """How much a slower network costs."""
    all_mbps, schedules = (125, 250, 500, 1000), tuple(PAPER_LOSS)
    cases = [
        Case(
            cluster(NANO_7B).with_bandwidth(mbps), schedules, as_published=True,
            num_prompts=lab.options.few, flags=f"--bandwidth {mbps}",
        )
        for mbps in all_mbps
    ]  # fmt: skip
    speeds = lab.speeds(cases)
    rows = [
        [name, *(f"{at[name]:.2f}" for at in speeds), per_cent(speeds[0][name], speeds[-1][name]), f"{loss:+.1f} %"]
        for name, loss in PAPER_LOSS.items()
    ]
    series = {name: [at[name] for at in speeds] for name in schedules}
    title = f"{NANO_7B} as published, draft eagle1, greedy"
    plots.sweep(lab.plot_path("bandwidth"), "bandwidth of every link, Mbps", all_mbps, series, title, log_x=True)
    return "\n\n".join(
        [
            f"{NANO_7B} as published, draft `eagle1`, greedy, {lab.options.few} prompts; tokens/s by Mbps, and what is "
            "lost from 1000 to 125 Mbps, here and in the paper (Llama-2, one data set).",
            markdown_table(["schedule", *map(str, all_mbps), "loss", "paper's loss"], rows),
            code(f"{command(cases[0], lab.options)}  # the first column"),
            image("bandwidth", "tokens per second by bandwidth"),
        ]
    )


def depth(lab: Lab) -> str:
    """How deep trees should be."""
    depths = range(3, 9)
    diagonal = [(d, d) for d in depths]
    inner = [(first, expand) for first in (4, 5, 6) for expand in (4, 5, 6)]
    pairs = list(dict.fromkeys([*diagonal, *inner, (8, 3)]))
    cases = [
        Case(
            cluster(NANO_7B), ("lockstep",), as_published=True, config=with_depths(*pair),
            num_prompts=lab.options.few, flags=f"depths {pair[0]} and {pair[1]}",
        )
        for pair in pairs
    ]  # fmt: skip
    speeds = {pair: of_case["lockstep"] for pair, of_case in zip(pairs, lab.speeds(cases), strict=True)}
    best, worst = max(speeds[pair] for pair in inner), min(speeds[pair] for pair in inner)
    on_diagonal = [speeds[pair] for pair in diagonal]
    title = f"lockstep on {NANO_7B} as published, both depths alike"
    plots.sweep(lab.plot_path("depth"), "depth as EAGLE counts", depths, {"lockstep": on_diagonal}, title)
    return "\n\n".join(
        [
            f"`lockstep` on {NANO_7B} as published, greedy, {lab.options.few} prompts; depths as EAGLE counts them, "
            "one level less than here. The first tree and the expansions have the same:",
            markdown_table(["depth", *map(str, depths)], [["tokens/s", *(f"{speed:.2f}" for speed in on_diagonal)]]),
            f"With both depths within 4..6 the nine combinations lie within {100 * (1 - worst / best):.1f} % of the "
            "best of them (paper: within 3 % of the best of all). First tree 8, expansions 3: "
            f"{per_cent(speeds[8, 3], speeds[5, 5])} against 5 and 5 (paper: {per_cent(8.79, 9.65)} with Llama-2, "
            f"{per_cent(9.48, 10.56)} with Vicuna).",
            code("python benchmarks/results.py --only depth"),
            image("depth", "tokens per second by depth"),
        ]
    )


def with_depths(first: int, expand: int) -> ScheduleConfig:
    """Depths in EAGLE's count, which leaves out the first pass."""
    tree = LockstepConfig().tree
    tree = replace(tree, depth=first + 1, max_depth=max(tree.max_depth, first + 1))
    return ScheduleConfig(lockstep=LockstepConfig(tree, expand_depth=expand + 1))


def ablation(lab: Lab) -> str:
    """What each of the three mechanisms of FlowSpec is worth."""
    schedules = ("lockstep", *(name for name in ABLATIONS if name.startswith("lockstep")))
    cases = [Case(cluster(name), schedules, as_published=True, num_prompts=lab.options.half) for name in NANOS]
    rows: list[list[str]] = []
    for case, runs in zip(cases, lab.run(cases), strict=True):
        for name, records in runs.items():
            result = ScheduleResult.of(name, records)
            ratio = interval(runs, name, "lockstep") if name != "lockstep" else "1"
            figures = [f"{result.tokens_per_s:.2f}", ratio, f"{result.mean_accepted:.2f}"]
            rows.append([case.cluster.name, name, *figures])
    return "\n\n".join(
        [
            f"As published, draft `eagle1`, greedy, {lab.options.half} prompts; one mechanism off at a time.",
            markdown_table(["cluster", "schedule", "tokens/s", "ratio to lockstep", "mean accepted"], rows),
            code(*(command(case, lab.options) for case in cases)),
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
    lab: Lab, section: str, label: str, values: Sequence[float], clusters: Sequence[ClusterSpec], flag: str
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


def timeline(lab: Lab) -> str:
    """A few seconds of the first prompt."""
    case = Case(cluster(NANO_7B), ("chunked", "lockstep", "flow"), as_published=True, num_prompts=1)
    params = SamplingParams(lab.options.max_new_tokens, seed=SEED)
    experiment = Experiment(case.cluster, case.config, params, case.as_published, with_spans=True)
    records = {name: run_piece(Piece(experiment, case.pair, name, range(1))) for name in case.schedules}
    title = f"{NANO_7B}, draft eagle1, chunked and lockstep as published, first prompt"
    draw_timeline(lab.plot_path("timeline"), records, title)
    return "\n\n".join(
        [
            f"What every place does in the first seconds after the prefill: {NANO_7B}, draft `eagle1`, greedy; "
            "`chunked` and `lockstep` as published, `flow` with its own costs.",
            image("timeline", "what the driver and the workers do"),
            code(f"{command(case, lab.options)} --timeline timeline.png"),
        ]
    )


SECTIONS: Mapping[str, tuple[str, Callable[[Lab], str]]] = {
    "published": ("The published schedules against the paper, greedy", published),
    "temperature": ("The published schedules against the paper, temperature 1", temperature),
    "engine": ("All schedules in the same engine", engine),
    "tuned": ("Against tuned rivals", tuned),
    "parts": ("`flow` without one of its parts", parts),
    "bound": ("How far from the bound", bound),
    "demo": ("Real tokens", demo),
    "whole": ("The whole against FlowSpec as published", whole),
    "timeline": ("A timeline", timeline),
    "bandwidth": ("Bandwidth", bandwidth),
    "depth": ("Depth of the trees", depth),
    "ablation": ("FlowSpec without one of its mechanisms", ablation),
    "stages": ("Number of stages", stages),
    "latency": ("Latency", latency),
}


# The page and the files beside it.


def write_json(lab: Lab, section: str) -> None:
    """What the section has used, one entry for each case."""
    if not lab.used:
        return
    entries = []
    for case, runs in lab.used:
        settings = {
            "as_published": case.as_published,
            "temperature": case.temperature,
            "num_prompts": case.num_prompts,
            "max_new_tokens": lab.options.max_new_tokens,
            **({"varied": case.flags} if case.flags else {}),
        }
        results = [ScheduleResult.of(name, records) for name, records in runs.items()]
        entries.append(results_json(case.cluster.name, case.pair.name, SEED, settings, results))
    path = lab.options.out / "results" / f"{section}.json"
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def write_sections(page: Path, written: Mapping[str, str]) -> None:
    """Put the sections between the markers; those that were not run, and all around them, stay as they are."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no {BEGIN} ... {END}; add the two lines where the figures belong")
    _, *old = re.split(r"^<!-- section: (\w+) -->$", inside, flags=re.MULTILINE)
    bodies = {name: body.strip("\n") for name, body in zip(old[::2], old[1::2], strict=True)}
    bodies |= {name: f"### {SECTIONS[name][0]}\n\n{body}" for name, body in written.items()}
    parts = [f"<!-- section: {name} -->\n{bodies[name]}" for name in SECTIONS if name in bodies]
    intro = (
        "`make results` runs these simulations and writes this part and the files in [results](results); "
        "`python benchmarks/results.py --only NAME` runs one: " + ", ".join(f"`{name}`" for name in SECTIONS) + "."
    )
    page.write_text(before + "\n\n".join([f"{BEGIN}\n{intro}", *parts, END]) + after, encoding="utf-8")


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    torch.set_num_threads(1)
    if jobs == 1:
        yield None
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-prompts", type=int, default=40, help="prompts; sections that vary much take fewer")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; the results stay the same")
    parser.add_argument("--quick", action="store_true", help="2 prompts of 24 tokens, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of RESULTS.md and results/")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="run this section; may be repeated")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out == ROOT / "docs":
        parser.error("--quick gives figures that mean nothing; name another folder with --out")
    if min(arguments.num_prompts, arguments.jobs, arguments.max_new_tokens - 1) < 1:
        parser.error("--num-prompts and --jobs must be at least 1, --max-new-tokens 2")
    num_prompts, max_new_tokens = (2, 24) if arguments.quick else (arguments.num_prompts, arguments.max_new_tokens)
    options = Options(num_prompts, max_new_tokens, arguments.out)
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    with processes(arguments.jobs) as pool:
        lab = Lab(options, pool)
        for name in arguments.only or SECTIONS:
            start = time.perf_counter()
            print(f"{name}: {SECTIONS[name][0]}", file=sys.stderr)
            lab.used = []
            write_sections(options.out / "RESULTS.md", {name: SECTIONS[name][1](lab)})
            write_json(lab, name)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
