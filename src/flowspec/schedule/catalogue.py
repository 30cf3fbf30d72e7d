"""All schedules by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flowspec.config import FlowParts, ScheduleConfig
from flowspec.draft.base import Levels
from flowspec.errors import UsageError
from flowspec.schedule.auto import Auto, Experience
from flowspec.schedule.autoregressive import Autoregressive
from flowspec.schedule.base import Schedule
from flowspec.schedule.flow import Flow
from flowspec.schedule.lockstep import Lockstep
from flowspec.schedule.pace import FixedPace, Pace
from flowspec.schedule.pipedec import PipeDec
from flowspec.schedule.serial import Chunked, Serial

SCHEDULES = ("ar", "serial", "chunked", "pipedec", "lockstep", "flow")  # compared where none is named
ONE_LEVEL = Levels()
AUTO = "auto"  # the default where one is to be fast
ABLATIONS: Mapping[str, str] = {  # name -> the field of ``LockstepConfig`` or ``FlowParts`` that is off
    "lockstep-no-score-order": "score_order",
    "lockstep-no-prune": "prune",
    "lockstep-no-expand": "expand",
    "flow-no-late-binding": "late_binding",
    "flow-no-segment-costs": "segment_costs",
    "flow-no-steady": "steady",
    "flow-no-cancel": "cancel",
    "flow-no-hints": "hints",
    "flow-no-ngrams": "ngrams",
}


def is_flow(name: str) -> bool:
    """Whether that is ``flow``, whole or with a part switched off, or as ``auto`` runs it; all others are published."""
    return name in ("flow", AUTO) or name.startswith("flow-")


def flow_parts(name: str, config: ScheduleConfig) -> FlowParts:
    """The parts of ``flow`` that are on in the schedule of that name."""
    if not name.startswith("flow-"):
        return config.flow_parts
    return replace(config.flow_parts, **{ABLATIONS[name]: False})


def check_schedule(name: str) -> None:
    """Raises ``UsageError`` for a name that is none."""
    if name not in (AUTO, *SCHEDULES, *ABLATIONS):
        raise UsageError(f"schedule {name!r} is none of {', '.join((AUTO, *SCHEDULES, *ABLATIONS))}")


def make_schedule(
    name: str,
    config: ScheduleConfig,
    num_stages: int,
    num_parallel: int | None = None,
    pace: Pace | FixedPace | None = None,
    levels: Levels = ONE_LEVEL,
    experience: Experience | None = None,
) -> Schedule:
    """A schedule for one request.

    ``num_parallel``: stages that run at the same time, if not all of them do. ``pace``: of the pipeline, where
    the costs of segments are known. ``levels``: the draft's. ``experience``: what earlier requests have left for
    ``auto``.

    Raises ``UsageError`` for a name that is none.
    """
    check_schedule(name)
    tree = config.lockstep.tree
    match name:
        case "ar":
            return Autoregressive(tree)
        case "serial":
            return Serial(tree)
        case "chunked":
            return Chunked(tree, num_stages, config.chunks)
        case "pipedec":
            return PipeDec(tree, num_stages, config.pipedec_width)
        case "lockstep":
            return Lockstep(config.lockstep, num_stages)
        case _ if name in ABLATIONS and name.startswith("lockstep"):
            return Lockstep(replace(config.lockstep, **{ABLATIONS[name]: False}), num_stages)
        case _:
            num_parallel = num_stages if num_parallel is None else num_parallel
            parts, pace = flow_parts(name, config), pace or FixedPace()
            if name == "auto":
                experience = experience or Experience()
                return Auto(config.flow, parts, config.pipeline, num_parallel, pace, levels, experience)
            return Flow(config.flow, parts, config.pipeline, num_parallel, pace, levels)
