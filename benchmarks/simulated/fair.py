"""``flow`` against each rival at its best: every cluster, every calibrated draft, greedy and sampled."""

from __future__ import annotations

from dataclasses import replace

from flowspec.bench.report import markdown_table
from simulated.lab import Case, Lab, all_clusters
from simulated.text import code, ratio_text, section_command, speed
from simulated.tuning import Tuned, tune

CALIBRATIONS = ("eagle1", "eagle3", "weak", "demo")
TEMPERATURES = (0.0, 1.0)


def fair(lab: Lab) -> str:
    """``flow`` / best tuned rival."""
    cases = [
        Case(spec, ("flow",), quality=quality, temperature=temperature)
        for quality in CALIBRATIONS for temperature in TEMPERATURES for spec in all_clusters()
    ]  # fmt: skip
    cases = cases[:1] if lab.options.is_quick else cases
    tuned = [max(own.values(), key=lambda rival: rival.tokens_per_s) for own in tune_once(lab, cases)]
    rivals = [
        replace(case, schedules=(own.schedule,), config=own.config, flags=own.text)
        for case, own in zip(cases, tuned, strict=True)
    ]
    compared = list(zip(cases, tuned, lab.run(cases), lab.run(rivals), strict=True))
    parts = [
        "`flow`, which has no settings for clusters or drafts, against the best of its rivals with settings searched "
        f"for each cluster and draft, on other texts: {settings_text()} Same engine, "
        f"{lab.options.num_prompts} prompts; in brackets the 95 % interval of a paired bootstrap over prompts.",
    ]
    least: list[list[str]] = []
    for quality in CALIBRATIONS:
        for temperature in TEMPERATURES:
            rows: list[list[str]] = []
            ratios: list[float] = []
            for case, own, flow_runs, rival_runs in compared:
                if (case.quality, case.temperature) != (quality, temperature):
                    continue
                flow, best = flow_runs["flow"], rival_runs[own.schedule]
                ratios.append(speed(flow) / speed(best))
                row = [case.cluster.name, f"{speed(flow):.2f}", own.schedule, own.text, f"{speed(best):.2f}"]
                rows.append([*row, ratio_text(flow, best)])
            if not rows:
                continue
            headers = ["cluster", "flow, tokens/s", "best rival", "its settings", "tokens/s", "flow / best rival"]
            parts += [f"Draft `{quality}`, temperature {temperature:g}:", markdown_table(headers, rows)]
            least.append([quality, f"{temperature:g}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"])
    summary = markdown_table(["draft", "temperature", "least of the clusters", "most"], least)
    parts.insert(1, f"`flow` / best tuned rival, in short:\n\n{summary}")
    return "\n\n".join([*parts, code(section_command("fair", lab.options))])


def tune_once(lab: Lab, cases: list[Case]) -> list[dict[str, Tuned]]:
    """A draft that is calibrated for greedy and sampled text apart is tuned for both; the others when greedy."""
    tunings = [case if case.quality == "demo" else replace(case, temperature=0.0) for case in cases]
    distinct = list(dict.fromkeys(tunings))
    found = dict(zip(distinct, tune(lab, distinct), strict=True))
    return [found[tuning] for tuning in tunings]


def settings_text() -> str:
    return (
        "`serial` over nodes and depth of its tree, `chunked` over these and the number of chunks, `pipedec` over its "
        "width, `lockstep` over nodes and depth of the first tree and of its expansions, the number of segments that "
        "the first tree is cut into, and deepening."
    )
