"""``flow`` as one would run it today against FlowSpec as published, and which part of that is owed to what."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from flowspec.bench.report import markdown_table
from flowspec.emulation.description import ClusterDescription
from simulated.lab import AGX_7B, Case, Lab, all_clusters, cluster
from simulated.text import code, command, speed

CAUSES = ("one message", "engine", "schedule", "hints", "draft", "int8")


def whole(lab: Lab) -> str:
    """From ``lockstep`` as published to ``flow``, one step at a time."""
    few = lab.options.few
    specs = [cluster(AGX_7B)] if lab.options.is_quick else all_clusters()
    ladders = {spec.name: ladder(spec, few) for spec in specs}
    runs = iter(lab.run([case for cases in ladders.values() for case in cases]))
    rows: list[list[str]] = []
    for name, cases in ladders.items():
        speeds = [speed(next(iter(next(runs).values()))) for _ in cases]
        factors = [after / before for before, after in pairwise(speeds)]
        product = f"{speeds[-1] / speeds[0]:.2f}"
        rows.append([name, f"{speeds[0]:.2f}", *(f"{factor:.2f}" for factor in factors), product, f"{speeds[-1]:.2f}"])
    headers = ["cluster", "lockstep as published", *CAUSES, "product", "flow, tokens/s"]
    first = next(iter(ladders.values()))
    return "\n\n".join(
        [
            "From `lockstep` with the published costs and draft `eagle1` to `flow` with this package's costs, hints "
            f"and draft `eagle3` in int8; greedy, {few} prompts. Each column is what one step multiplies the tokens/s "
            "by: a commit of one message to each worker instead of two broadcasts along a tree; the rest of this "
            "package's driver; the schedule; hints; the draft; its int8 weights. The two drafts belong to different "
            "texts.",
            markdown_table(headers, rows),
            code(f"{command(first[0], lab.options)}  # the first row", f"{command(first[-1], lab.options)}  # its end"),
        ]
    )


def ladder(spec: ClusterDescription, num_prompts: int) -> list[Case]:
    one_message = replace(spec, published=replace(spec.published, broadcast="direct", broadcast_messages=1))
    published = Case(spec, ("lockstep",), as_published=True, num_prompts=num_prompts)
    schedule = replace(published, as_published=False, schedules=("flow-no-hints",))
    draft = replace(schedule, schedules=("flow",), quality="eagle3")
    return [
        published,
        replace(published, cluster=one_message, flags="one message"),
        replace(published, as_published=False),
        schedule,
        replace(schedule, schedules=("flow",)),
        draft,
        replace(draft, int8_draft=True, flags="--draft-dtype int8"),
    ]
