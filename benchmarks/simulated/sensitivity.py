"""What becomes of ``flow`` where it knows less, or where the cluster is less even, than its plans assume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flowspec.bench.report import markdown_table
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Faults
from flowspec.emulation.start_up import StartUp
from simulated.lab import AGX_7B, NANO_7B, Case, Lab, cluster
from simulated.text import code, ratio_text, section_command, speed

CLUSTERS = (NANO_7B, AGX_7B, "7b-agx-8", "7b-agx-wan-20ms")
BUSY = 2.0  # times as long, for everything that the driver does

CONDITIONS: dict[str, Callable[[Case], Case]] = {
    "as everywhere here: measured at start-up with an error of 5 %": lambda case: case,
    "costs known exactly": lambda case: replace(case, start_up=StartUp(error=0.0)),
    "an error of 15 %": lambda case: replace(case, start_up=StartUp(error=0.15)),
    "forwards seem 30 % too short": lambda case: replace(case, start_up=StartUp(bias=0.7)),
    "forwards seem 40 % too long": lambda case: replace(case, start_up=StartUp(bias=1.4)),
    "every message late by up to 10 ms": lambda case: replace(case, faults=Faults(max_delay_ms=10.0)),
    "a driver that takes twice as long": lambda case: replace(case, cluster=with_busy_driver(case)),
    "nothing known, segments sent as soon as there is room": lambda case: replace(
        case, schedules=("lockstep", "flow-no-late-binding")
    ),
}


def sensitivity(lab: Lab) -> str:
    """``flow`` under other conditions than it was made for."""
    cases = [
        change(Case(cluster(name), ("lockstep", "flow"), quality=quality, num_prompts=lab.options.few, flags=condition))
        for quality in ("eagle1", "eagle3") for condition, change in CONDITIONS.items() for name in CLUSTERS
    ]  # fmt: skip
    all_runs = iter(lab.run(cases))
    parts = [
        "The same clusters under other conditions: `flow` in tokens/s of `flow` as everywhere here, and against "
        f"`lockstep` (defaults) under the same conditions. Same engine, greedy, {lab.options.few} prompts.",
    ]
    for quality in ("eagle1", "eagle3"):
        usual: dict[str, float] = {}
        rows: list[list[str]] = []
        for condition in CONDITIONS:
            row = [condition]
            for name in CLUSTERS:
                lockstep, flow = next(all_runs).values()
                share = speed(flow) / usual.setdefault(name, speed(flow))
                row.append(f"{share:.2f}; {ratio_text(flow, lockstep)}")
            rows.append(row)
        parts += [f"Draft `{quality}`:", markdown_table(["condition", *CLUSTERS], rows)]
    return "\n\n".join([*parts, code(section_command("sensitivity", lab.options))])


def with_busy_driver(case: Case) -> ClusterDescription:
    ours = case.cluster.ours
    times = {
        name: BUSY * getattr(ours, name)
        for name in ("draft_pass_ms", "lm_head_ms", "verify_ms", "merge_ms", "send_ms", "hint_ms")
    }
    return replace(case.cluster, ours=replace(ours, **times))
