"""The page and the files beside it: which sections there are, in which order, and what of each is written where."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from flowspec.bench.report import environment, results_json
from flowspec.request.records import ScheduleResult
from simulated import block, fair, flow, paper, rivals, sensitivity, whole
from simulated.lab import SEED, Lab

BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"

SECTIONS: Mapping[str, tuple[str, Callable[[Lab], str]]] = {
    "published": ("The published schedules against the paper, greedy", paper.published),
    "temperature": ("The published schedules against the paper, temperature 1", paper.temperature),
    "fair": ("`flow` against each rival at its best", fair.fair),
    "engine": ("All schedules with their default settings", rivals.engine),
    "sensitivity": ("What `flow` has to know", sensitivity.sensitivity),
    "parts": ("`flow` without one of its parts", flow.parts),
    "bound": ("How far from the ceiling", flow.bound),
    "block": ("A draft that guesses blocks", block.block),
    "demo": ("Real tokens", rivals.demo),
    "whole": ("The whole against FlowSpec as published", whole.whole),
    "timeline": ("A timeline", flow.timeline),
    "bandwidth": ("Bandwidth", paper.bandwidth),
    "depth": ("Depth of the trees", paper.depth),
    "ablation": ("FlowSpec without one of its mechanisms", paper.ablation),
    "stages": ("Number of stages", rivals.stages),
    "latency": ("Latency", rivals.latency),
}


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


def stamp() -> str:
    """When, and with which code."""
    return f"Simulated on {datetime.date.today():%Y-%m-%d} with commit {(environment()['commit'] or 'unknown')[:9]}."


def write_sections(page: Path, written: Mapping[str, str]) -> None:
    """Put the sections between the markers; those that were not run, and all around them, stay as they are."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no {BEGIN} ... {END}; add the two lines where the figures belong")
    _, *old = re.split(r"^<!-- section: (\w+) -->$", inside, flags=re.MULTILINE)
    bodies = {name: body.strip("\n") for name, body in zip(old[::2], old[1::2], strict=True)}
    bodies |= {name: f"### {SECTIONS[name][0]}\n\n{body}\n\n{stamp()}" for name, body in written.items()}
    parts = [f"<!-- section: {name} -->\n{bodies[name]}" for name in SECTIONS if name in bodies]
    intro = (
        "`make results` runs these simulations and writes this part and the files in [results](results); "
        "`python benchmarks/results.py --only NAME` runs one: " + ", ".join(f"`{name}`" for name in SECTIONS) + "."
    )
    page.write_text(before + "\n\n".join([f"{BEGIN}\n{intro}", *parts, END]) + after, encoding="utf-8")
