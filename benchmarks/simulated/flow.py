"""Sections that look into ``flow``: what its parts are worth, what its time is spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flowspec.bench import plots
from flowspec.bench.report import markdown_table
from flowspec.bench.study import draw_timeline
from flowspec.core import SamplingParams
from flowspec.emulation.costs import DriverCosts
from flowspec.emulation.experiment import Experiment
from flowspec.schedule.catalogue import ABLATIONS
from simulated.lab import NANO_7B, NANO_13B, SEED, Case, Lab, Piece, all_clusters, cluster, run_piece
from simulated.text import code, command, image, interval, section_command, speed


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
    """How far ``flow`` is from what its pipeline and its draft's candidates could give, and where its time goes."""
    few = lab.options.few
    bars: dict[str, dict[str, float]] = {}
    cases = [
        Case(spec, ("flow",), quality=quality, num_prompts=few)
        for quality in ("eagle1", "eagle3") for spec in all_clusters()
    ]  # fmt: skip
    rows = bound_rows(lab, cases, bars)
    title = "Time per token of flow, by what its busiest stage does; greedy, same engine"
    plots.stacked(lab.plot_path("bound"), bars, "ms per token, as a share of the whole", title)
    headers = ["cluster", "draft", "flow, tokens/s", "free driver", "ceiling", "share", "useful", "wasted", "waiting"]
    return "\n\n".join(
        [
            "The ceiling is `flow` with a driver whose work takes no time, and a clairvoyant draft: it knows which of "
            "the real one's candidates is the target's token, if any is. No ranking of the same candidates does "
            "better, and none does as well, since a draft knows probabilities alone. `share` is `flow`'s part of it. "
            "Of the time of `flow`'s busiest stage: forwards with an accepted row, those without, and the rest, in "
            f"which it waits. Greedy, {few} prompts.",
            markdown_table(headers, rows),
            code(section_command("bound", lab.options)),
            image("bound", "time per token by what the busiest stage does"),
        ]
    )


def bound_rows(lab: Lab, cases: Sequence[Case], bars: dict[str, dict[str, float]] | None = None) -> list[list[str]]:
    """A row for each case of ``flow``; its times, in ms per token, are added to ``bars``."""
    rows: list[list[str]] = []
    for actual in cases:
        spec, quality = actual.cluster, actual.quality
        free = replace(spec, ours=DriverCosts(0.0, 0.0, 0.0, block_pass_ms=0.0, hop_ms=spec.ours.hop_ms))
        no_driver = replace(actual, cluster=free, flags="free driver")
        foreseen = replace(no_driver, quality=f"{quality}-clairvoyant", flags="free driver, clairvoyant draft")
        speeds = [runs["flow"] for runs in lab.speeds([actual, no_driver, foreseen])]
        useful, wasted = busy_shares(lab, actual)
        shares = {"useful forwards": useful, "wasted forwards": wasted, "waiting": 1 - useful - wasted}
        if bars is not None:
            bars[f"{spec.name}\n{quality}"] = {name: 1e3 / speeds[0] * share for name, share in shares.items()}
        rows.append([spec.name, quality, *(f"{each:.2f}" for each in speeds), f"{speeds[0] / speeds[2]:.2f}"])
        rows[-1] += [f"{100 * share:.0f} %" for share in shares.values()]
    return rows


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
