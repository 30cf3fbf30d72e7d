"""Sections that repeat the paper's experiments, with the costs of the paper's code (FlowSpec, arXiv 2507.02620)."""

from __future__ import annotations

from dataclasses import replace

from flowspec.bench import plots
from flowspec.bench.report import markdown_table
from flowspec.config import LockstepConfig, ScheduleConfig
from flowspec.emulation.experiment import TENSOR_PARALLEL
from flowspec.request.records import ScheduleResult
from flowspec.schedule.catalogue import ABLATIONS
from simulated.lab import NANO_7B, NANO_13B, Case, Lab, cluster
from simulated.text import code, command, image, interval, per_cent, section_command

NANOS = (NANO_7B, NANO_13B)
PUBLISHED = ("chunked", "pipedec", "lockstep", "serial", "ar")

# (cluster, temperature) -> schedule -> tokens/s with Llama-2 and Vicuna, means over six data sets.
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
            code(section_command("depth", lab.options)),
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
