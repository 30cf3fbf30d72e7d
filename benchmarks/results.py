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

import torch

from flowspec.bench import plots
from flowspec.bench.report import markdown_table, ratio_interval, results_json
from flowspec.bench.runner import PairSpec, simulate_piece
from flowspec.bench.study import draw_timeline
from flowspec.cluster import ClusterSpec
from flowspec.config import LockstepConfig, ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.records import RequestRecord, ScheduleResult
from flowspec.schedule.catalogue import ABLATIONS, SCHEDULES
from flowspec.simulator import TENSOR_PARALLEL, Experiment

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"
SEED = 0
DEFAULTS = ScheduleConfig()
PIECE = 5  # prompts that a process simulates at once

NANO_7B, NANO_13B, AGX_7B = "7b-nano-150m", "13b-4bit-nano-150m", "7b-agx-1g"
NANOS = (NANO_7B, NANO_13B)
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
    flags: str = ""  # how the cluster or the configuration differs, as flags of ``flowspec simulate``


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
    quality: str
    schedule: str
    prompts: range


def run_piece(piece: Piece) -> list[RequestRecord]:
    prompts = [(index, f"{SEED} {index}") for index in piece.prompts]  # the texts of ``flowspec simulate``
    return simulate_piece(piece.experiment, PairSpec(draft_quality=piece.quality), piece.schedule, prompts)


class Lab:
    """Simulates what was not simulated yet, on all processes, and notes what a section has used."""

    def __init__(self, options: Options, pool: ProcessPoolExecutor | None) -> None:
        self.options = options
        self.used: list[tuple[Case, Runs]] = []  # by the section at work
        self._map = pool.map if pool else map
        self._records: dict[tuple[Experiment, str, str], list[RequestRecord]] = {}

    def run(self, cases: Sequence[Case]) -> list[Runs]:
        """The records of every case."""
        cases = [replace(case, num_prompts=case.num_prompts or self.options.num_prompts) for case in cases]
        pieces = list(dict.fromkeys(piece for case in cases for piece in self._missing(case)))
        for done, (piece, records) in enumerate(zip(pieces, self._map(run_piece, pieces), strict=True), 1):
            self._records.setdefault((piece.experiment, piece.quality, piece.schedule), []).extend(records)
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

    def _key(self, case: Case, schedule: str) -> tuple[Experiment, str, str]:
        params = SamplingParams(self.options.max_new_tokens, case.temperature, seed=SEED)
        as_published = case.as_published and schedule != "flow"  # which has its own costs in any case
        return Experiment(case.cluster, case.config, params, as_published), case.quality, schedule

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
    ratio, low, high = ratio_interval(runs[above], runs[below])
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"


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
    parts = [
        "All schedules in the same engine, with the driver's costs of this package, greedy, "
        f"{lab.options.few} prompts. In brackets: 95 % interval of a paired bootstrap over prompts."
    ]
    for quality in ("eagle1", "eagle3"):
        cases = [Case(c, SCHEDULES, quality=quality, num_prompts=lab.options.few) for c in all_clusters()]
        all_runs = {case.cluster.name: runs for case, runs in zip(cases, lab.run(cases), strict=True)}
        results = {name: [ScheduleResult.of(*item) for item in runs.items()] for name, runs in all_runs.items()}
        rows: list[list[str]] = []
        for name, runs in all_runs.items():
            others = [result for result in results[name] if result.schedule != "flow"]
            best = max(others, key=lambda result: result.tokens_per_s).schedule
            ratios = [interval(runs, "flow", "lockstep"), f"{best} {interval(runs, 'flow', best)}"]
            rows.append([name, *(f"{result.tokens_per_s:.2f}" for result in results[name]), *ratios])
        headers = ["cluster", *SCHEDULES, "flow / lockstep", "flow / best other"]
        parts += [f"Draft `{quality}`, tokens/s:", markdown_table(headers, rows)]
        parts += [code(f"{command(cases[0], lab.options)}  # the first row")]
        if quality == "eagle1":
            title = "Simulated decode rate, draft eagle1, same engine, greedy"
            plots.throughput_bars(lab.plot_path("throughput"), {name: results[name] for name in DRAWN}, title)
            title = f"What became of segments: {NANO_7B}, draft eagle1, same engine, greedy"
            drawn = {name: all_runs[NANO_7B][name] for name in ("chunked", "pipedec", "lockstep", "flow")}
            plots.accepted_per_segment(lab.plot_path("accepted"), drawn, title)
    parts += [image("throughput", "tokens per second by cluster"), image("accepted", "accepted nodes per segment")]
    return "\n\n".join(parts)


def whole(lab: Lab) -> str:
    """``flow`` as one would run it today against FlowSpec as published."""
    clusters, few = all_clusters(), lab.options.few
    theirs = [Case(c, ("lockstep",), as_published=True, num_prompts=few) for c in clusters]
    ours = [Case(c, ("flow",), quality="eagle3", num_prompts=few) for c in clusters]
    rows: list[list[str]] = []
    for spec, old, new in zip(clusters, lab.speeds(theirs), lab.speeds(ours), strict=True):
        lockstep, flow = old["lockstep"], new["flow"]
        rows.append([spec.name, f"{lockstep:.2f}", f"{flow:.2f}", f"{flow / lockstep:.2f}"])
    return "\n\n".join(
        [
            "Schedule, engine and draft together: `flow` with this package's costs and draft `eagle3` against "
            f"`lockstep` with the published costs and draft `eagle1`; greedy, {few} prompts. The two drafts belong to "
            "different texts, so these are ratios of total throughputs, and no prompt is compared with itself.",
            markdown_table(["cluster", "lockstep as published", "flow", "ratio"], rows),
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
    schedules = ("lockstep", *ABLATIONS)
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
    nums = (2, 4, 8, 16)
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
    records = {name: run_piece(Piece(experiment, case.quality, name, range(1))) for name in case.schedules}
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
        model = PairSpec(draft_quality=case.quality).name
        entries.append(results_json(case.cluster.name, model, SEED, settings, results))
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
