"""``flow`` against each rival at its best: every cluster, every calibrated draft, greedy and sampled."""

from __future__ import annotations

from dataclasses import replace

from flowspec.bench.report import markdown_table
from flowspec.request.records import RequestRecord
from simulated.lab import Case, Lab, Runs, all_clusters
from simulated.text import code, ratio_text, speed
from simulated.tuning import Tuned, tune

CALIBRATIONS = ("eagle1", "eagle3", "weak", "demo")
TEMPERATURES = (0.0, 1.0)
NUM_MEASURED = 1  # rivals that the tuning found fastest, of which the fastest one counts


def fair(lab: Lab) -> str:
    """``flow`` / best tuned rival."""
    cases = [
        Case(spec, ("flow",), quality=quality, temperature=temperature)
        for quality in CALIBRATIONS for temperature in TEMPERATURES for spec in all_clusters()
    ]  # fmt: skip
    cases = cases[:1] if lab.options.is_quick else cases
    tuned = [fastest(own) for own in tune_once(lab, cases)]
    rivals = [
        replace(case, schedules=(own.schedule,), config=own.config, flags=own.text)
        for case, of_case in zip(cases, tuned, strict=True)
        for own in of_case
    ]
    flows, rival_runs = lab.run(cases), lab.run(rivals)
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
            for index, case in enumerate(cases):
                if (case.quality, case.temperature) != (quality, temperature):
                    continue
                flow = flows[index]["flow"]
                own, best = best_of(tuned[index], rival_runs[index * NUM_MEASURED : (index + 1) * NUM_MEASURED])
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
    return "\n\n".join([*parts, code("python benchmarks/results.py --only fair")])


def tune_once(lab: Lab, cases: list[Case]) -> list[dict[str, Tuned]]:
    """A draft that is calibrated for greedy and sampled text apart is tuned for both; the others when greedy."""
    tunings = [case if case.quality == "demo" else replace(case, temperature=0.0) for case in cases]
    distinct = list(dict.fromkeys(tunings))
    found = dict(zip(distinct, tune(lab, distinct), strict=True))
    return [found[tuning] for tuning in tunings]


def fastest(tuned: dict[str, Tuned]) -> list[Tuned]:
    return sorted(tuned.values(), key=lambda own: -own.tokens_per_s)[:NUM_MEASURED]


def best_of(tuned: list[Tuned], runs: list[Runs]) -> tuple[Tuned, list[RequestRecord]]:
    pairs = [(own, of_case[own.schedule]) for own, of_case in zip(tuned, runs, strict=True)]
    return max(pairs, key=lambda pair: speed(pair[1]))


def settings_text() -> str:
    return (
        "`serial` over nodes and depth of its tree, `chunked` over these and the number of chunks, `pipedec` over its "
        "width, `lockstep` over nodes and depth of the first tree and of its expansions, the number of segments that "
        "the first tree is cut into, and deepening."
    )
