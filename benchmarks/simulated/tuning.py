"""The best settings of each rival on one cluster with one draft, found on texts that no table is measured on.

From the published settings on, one of them is varied at a time and the best value kept. So a rival gets what ``flow``
does for itself: segments, trees and depths that suit devices, links and draft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flowspec.config import LockstepConfig, ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.emulation.experiment import Experiment
from flowspec.model.synthetic import quality
from flowspec.request.records import ScheduleResult
from simulated.lab import DEFAULTS, SEED, Case, Lab, Piece, run_piece

Settings = dict[str, int]

FIRST_TEXT, NUM_TEXTS, NUM_TOKENS = 1000, 2, 128  # to tune on

SIZES, DEPTHS = (16, 32, 48, 64, 80, 120, 160, 240), (3, 4, 5, 6, 7, 8, 10, 12)
SPACES: Mapping[str, Mapping[str, Sequence[int]]] = {
    "serial": {"depth": DEPTHS, "nodes": SIZES},
    "chunked": {"chunks": (2, 3, 5, 7, 9, 17), "nodes": SIZES[::2], "depth": DEPTHS[1::2]},
    "pipedec": {"width": (2, 4, 8, 16, 24, 32, 64)},
    "lockstep": {
        "nodes": (32, 48, 80, 120, 160, 240),
        "expansion": (8, 16, 32, 64, 120),
        "depth": (3, 4, 5, 6, 7, 8),
        "expansion depth": (2, 3, 4, 6, 8),
        "segments": (0, 1, 2, 3),
        "deepening": (0, 1),
    },
}
BLOCK_SPACES: Mapping[str, Mapping[str, Sequence[int]]] = {  # a coarser grid that goes as deep as a block of 15
    "serial": {"depth": (6, 8, 10, 12, 15), "nodes": (32, 48, 64, 80, 120, 160)},
    "chunked": {"chunks": (2, 3, 5, 9), "nodes": (32, 48, 80, 160), "depth": (6, 10, 15)},
    "pipedec": {"width": (8, 16, 32)},
    "lockstep": {
        "nodes": (32, 48, 80, 160),
        "expansion": (16, 32, 64),
        "depth": (6, 8, 12, 15),
        "expansion depth": (6, 8, 12, 15),
        "segments": (0, 1, 2, 3),
        "deepening": (0, 1),
    },
}


@dataclass(frozen=True)
class Tuned:
    """One rival's best settings, and what it made with them of the texts that it was tuned on."""

    schedule: str
    settings: tuple[tuple[str, int], ...]
    tokens_per_s: float

    @property
    def config(self) -> ScheduleConfig:
        return config_of(self.schedule, dict(self.settings))

    @property
    def text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.settings)


def space(draft_quality: str, schedule: str) -> Mapping[str, Sequence[int]]:
    """The values that each setting is tried with."""
    return (SPACES if quality(draft_quality).block_len == 1 else BLOCK_SPACES)[schedule]


def published(schedule: str, num_stages: int) -> Settings:
    """Of those settings that are tuned."""
    own = DEFAULTS.lockstep
    known = {
        "nodes": own.tree.size - 1,
        "depth": own.tree.depth,
        "chunks": num_stages + 1,
        "width": DEFAULTS.pipedec_width,
        "expansion": own.expand_size,
        "expansion depth": own.expand_depth,
        "segments": own.segments,
        "deepening": int(own.deepen),
    }
    return {name: known[name] for name in SPACES[schedule]}


def config_of(schedule: str, settings: Settings) -> ScheduleConfig:
    if schedule == "pipedec":
        return ScheduleConfig(pipedec_width=settings["width"])
    depth = settings["depth"]
    own = DEFAULTS.lockstep
    max_depth = max(depth, own.tree.max_depth, settings.get("expansion depth", 0))
    tree = replace(own.tree, size=settings["nodes"] + 1, depth=depth, max_depth=max_depth)
    if schedule != "lockstep":
        return ScheduleConfig(lockstep=LockstepConfig(tree), chunks=settings.get("chunks", 0))
    config = LockstepConfig(
        tree,
        expand_depth=settings["expansion depth"],
        expand_size=settings["expansion"],
        deepen=bool(settings["deepening"]),
        deepen_size=min(own.deepen_size, settings["expansion"]),
        segments=settings["segments"],
    )
    return ScheduleConfig(lockstep=config)


def tune(lab: Lab, cases: Sequence[Case]) -> list[dict[str, Tuned]]:
    """For each case, its cluster, draft and temperature: every rival at its best."""
    found = iter(lab.map(_search, [Search(case, schedule) for case in cases for schedule in SPACES]))
    return [{schedule: next(found) for schedule in SPACES} for _ in cases]


@dataclass(frozen=True)
class Search:
    """What one process tunes at once."""

    case: Case
    schedule: str


def _search(search: Search) -> Tuned:
    case, schedule = search.case, search.schedule
    speeds: dict[tuple[tuple[str, int], ...], float] = {}

    def speed(settings: Settings) -> float:
        key = tuple(settings.items())
        if key not in speeds:
            speeds[key] = _speed(case, schedule, config_of(schedule, settings))
        return speeds[key]

    best = published(schedule, case.cluster.num_stages)
    for name, values in space(case.quality, schedule).items():
        best = max((best, *({**best, name: value} for value in values)), key=speed)
    return Tuned(schedule, tuple(best.items()), speed(best))


def _speed(case: Case, schedule: str, config: ScheduleConfig) -> float:
    params = SamplingParams(NUM_TOKENS, case.temperature, seed=SEED)
    experiment = Experiment(case.cluster, config, params)
    records = run_piece(Piece(experiment, case.pair, schedule, range(FIRST_TEXT, FIRST_TEXT + NUM_TEXTS)))
    return ScheduleResult.of(schedule, records).tokens_per_s
