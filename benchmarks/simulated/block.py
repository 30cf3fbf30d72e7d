"""A draft that guesses a block in one pass: ``flow`` against its rivals, the whole, and what limits it."""

from __future__ import annotations

from dataclasses import replace

from flowspec.bench.report import markdown_table
from simulated.fair import settings_text
from simulated.flow import bound_rows
from simulated.lab import AGX_7B, NANO_7B, Case, Lab, all_clusters
from simulated.text import code, command, ratio_text, section_command, speed
from simulated.tuning import tune

QUALITY = "block"
LIMITS = (
    "What limits it: a deep block makes the rivals strong, too, whose trees are as deep now and cost one pass; "
    "and more rows bring less and less. `flow` has about three times as many of them under way as `serial` sends "
    "for a tree, and most of the time of its busiest stage goes to rows that come to nothing. One token in 39 is "
    "none of the draft's 24 candidates: each of these empties every pipeline, and costs a whole way through it. "
    "What helped `flow`, on three texts and clusters: trees as deep as the block (7 %), and to send a new root "
    "with guesses of the block before, so that no pass stands in the way (4 % on slow devices, 6 % on fast ones, "
    "2 % over links of 20 ms). What did not: more segments under way, longer segments after a miss, a root ahead "
    "of its guesses, passes only every few tokens, and nodes in the order of what it saves to send them before "
    "their parents' results come (0.1 % either way, with `eagle1` too)."
)
BOUNDED = (AGX_7B, NANO_7B)


def block(lab: Lab) -> str:
    """All three tables."""
    cases = [Case(spec, ("flow",), quality=QUALITY) for spec in all_clusters()]
    cases = cases[:1] if lab.options.is_quick else cases
    headers = ["cluster", "draft", "flow, tokens/s", "free driver", "ceiling", "share", "useful", "wasted", "waiting"]
    bounded = [replace(case, num_prompts=few(lab)) for case in cases if case.cluster.name in BOUNDED]
    published, whole = whole_cases(cases[0], lab)
    return "\n\n".join(
        [
            "Draft `block`: 15 levels in one pass, as DFlash2 and DSpark guess them. `flow` against the best of its "
            f"rivals with settings searched for each cluster on other texts: {settings_text()} Trees of all of them go "
            f"as deep as the block, and take one pass. Same engine, greedy, {lab.options.num_prompts} prompts.",
            rivals(lab, cases),
            "From `lockstep` as published with draft `eagle1` to `flow` with `block` in int8 and this package's costs; "
            f"{few(lab)} prompts. The two drafts belong to different texts.",
            whole_table(lab, cases),
            LIMITS,
            f"How far two of them are from the ceiling, as in the section on it; {few(lab)} prompts.",
            markdown_table(headers, bound_rows(lab, bounded)),
            code(
                section_command("block", lab.options),
                f"{command(published, lab.options)}  # the second table, first row",
                f"{command(whole, lab.options)}  # its end",
            ),
        ]
    )


def few(lab: Lab) -> int:
    """Prompts of the tables that have no intervals."""
    return 2 if lab.options.is_quick else 4


def rivals(lab: Lab, cases: list[Case]) -> str:
    tuned = [max(own.values(), key=lambda rival: rival.tokens_per_s) for own in tune(lab, cases)]
    rival_cases = [
        replace(case, schedules=(own.schedule,), config=own.config, flags=own.text)
        for case, own in zip(cases, tuned, strict=True)
    ]
    rows: list[list[str]] = []
    for case, own, flow_runs, rival_runs in zip(cases, tuned, lab.run(cases), lab.run(rival_cases), strict=True):
        flow, best = flow_runs["flow"], rival_runs[own.schedule]
        row = [case.cluster.name, f"{speed(flow):.2f}", own.schedule, own.text, f"{speed(best):.2f}"]
        rows.append([*row, ratio_text(flow, best)])
    headers = ["cluster", "flow, tokens/s", "best rival", "its settings", "tokens/s", "flow / best rival"]
    return markdown_table(headers, rows)


def whole_cases(case: Case, lab: Lab) -> tuple[Case, Case]:
    published = Case(case.cluster, ("lockstep",), as_published=True, num_prompts=few(lab))
    return published, replace(case, int8_draft=True, num_prompts=few(lab), flags="--draft-dtype int8")


def whole_table(lab: Lab, cases: list[Case]) -> str:
    pairs = [whole_cases(case, lab) for case in cases]
    runs = lab.run([case for pair in pairs for case in pair])
    rows = [
        [case.cluster.name, f"{speed(before['lockstep']):.2f}", f"{speed(after['flow']):.2f}",
         f"{speed(after['flow']) / speed(before['lockstep']):.2f}"]
        for case, before, after in zip(cases, runs[::2], runs[1::2], strict=True)
    ]  # fmt: skip
    return markdown_table(["cluster", "lockstep as published", "flow, tokens/s", "ratio"], rows)
