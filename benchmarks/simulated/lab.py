"""What is simulated: cases, each once, in pieces on all processes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from flowspec.bench.prompts import BUILT_IN_PROMPTS
from flowspec.bench.runner import SYNTHETIC, PairSpec, simulate_piece
from flowspec.config import ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Experiment, Faults
from flowspec.emulation.start_up import AS_USUAL, StartUp
from flowspec.request.records import RequestRecord, ScheduleResult
from simulated.store import Asked, Store

ROOT = Path(__file__).parents[2]
SEED = 0
DEFAULT_NUM_PROMPTS = 40
DEFAULTS, NO_FAULTS = ScheduleConfig(), Faults()
PIECE = 5  # prompts that a process simulates at once

NANO_7B, NANO_13B, AGX_7B = "7b-nano-150m", "13b-4bit-nano-150m", "7b-agx-1g"

Item = TypeVar("Item", bound=Asked)
Result = TypeVar("Result")
Runs = dict[str, list[RequestRecord]]  # by schedule, in the order of the prompts


@dataclass(frozen=True)
class Case:
    """Some schedules under the same conditions."""

    cluster: ClusterDescription
    schedules: tuple[str, ...]
    as_published: bool = False
    quality: str = "eagle1"
    temperature: float = 0.0
    config: ScheduleConfig = DEFAULTS
    num_prompts: int = 0  # 0: all
    model: str = SYNTHETIC
    int8_draft: bool = False  # the driver's draft head
    start_up: StartUp = AS_USUAL
    faults: Faults = NO_FAULTS
    flags: str = ""  # how cluster or configuration differ, as flags of ``flowspec simulate`` where it has them

    @property
    def pair(self) -> PairSpec:
        return PairSpec(self.model, self.quality)


@dataclass(frozen=True)
class Options:
    num_prompts: int
    max_new_tokens: int
    out: Path
    is_quick: bool = False  # to see that it works

    @property
    def half(self) -> int:
        """Prompts of sections that add a variation to another one."""
        return max(2, self.num_prompts // 2)

    @property
    def few(self) -> int:
        """Prompts of sections with many configurations."""
        return max(2, self.num_prompts // 5)


@dataclass(frozen=True)
class Piece:
    """What one process simulates at once."""

    experiment: Experiment
    pair: PairSpec
    schedule: str
    prompts: range


def run_piece(piece: Piece) -> list[RequestRecord]:
    """On the texts of ``flowspec simulate``."""
    is_synthetic = piece.pair.model == SYNTHETIC
    texts = [f"{SEED} {index}" for index in range(piece.prompts.stop)] if is_synthetic else BUILT_IN_PROMPTS
    prompts = [(index, texts[index % len(texts)]) for index in piece.prompts]
    return simulate_piece(piece.experiment, piece.pair, piece.schedule, prompts)


class Lab:
    """Simulates what was not simulated yet, on all processes, and notes what a section has used."""

    def __init__(self, options: Options, pool: ProcessPoolExecutor | None, store: Store | None = None) -> None:
        """``store``: of earlier runs."""
        self.options = options
        self.used: list[tuple[Case, Runs]] = []  # by the section at work
        self._pool = pool
        self._store = store
        self._records: dict[tuple[Experiment, PairSpec, str], list[RequestRecord]] = {}

    def run(self, cases: Sequence[Case]) -> list[Runs]:
        """The records of every case."""
        cases = [replace(case, num_prompts=case.num_prompts or self.options.num_prompts) for case in cases]
        pieces = list(dict.fromkeys(piece for case in cases for piece in self._missing(case)))
        for piece, records in zip(pieces, self.map(run_piece, pieces), strict=True):
            self._records.setdefault((piece.experiment, piece.pair, piece.schedule), []).extend(records)
        runs = [
            {name: self._records[self._key(case, name)][: case.num_prompts] for name in case.schedules}
            for case in cases
        ]
        self.used += zip(cases, runs, strict=True)
        return runs

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The function of every item, in their order; what the store has is taken from there."""
        name, store = function.__name__, self._store
        kept = [None if store is None else store.find(name, item) for item in items]
        results: dict[int, Result] = {index: result for index, result in enumerate(kept) if result is not None}
        missing = [index for index in range(len(items)) if index not in results]
        todo = [items[index] for index in missing]
        done = self._pool.map(function, todo) if self._pool else map(function, todo)
        for number, (index, result) in enumerate(zip(missing, done, strict=True), 1):
            results[index] = result
            if store is not None:
                store.keep(name, items[index], result)
            if sys.stderr.isatty() or number % 20 == 0 or number == len(missing):
                print(f"  {number}/{len(missing)} {items[index].schedule}", file=sys.stderr)
        return [results[index] for index in range(len(items))]

    def speeds(self, cases: Sequence[Case]) -> list[dict[str, float]]:
        """Tokens per second of every case, by schedule."""
        return [
            {name: ScheduleResult.of(name, records).tokens_per_s for name, records in runs.items()}
            for runs in self.run(cases)
        ]

    def _key(self, case: Case, schedule: str) -> tuple[Experiment, PairSpec, str]:
        params = SamplingParams(self.options.max_new_tokens, case.temperature, seed=SEED)
        as_published = case.as_published and not schedule.startswith("flow")  # which has its own costs in any case
        experiment = Experiment(
            case.cluster, case.config, params, as_published, case.faults, case.start_up, int8_draft=case.int8_draft
        )
        return experiment, case.pair, schedule

    def _missing(self, case: Case) -> Iterator[Piece]:
        for schedule in case.schedules:
            key = self._key(case, schedule)
            for start in range(len(self._records.get(key, ())), case.num_prompts, PIECE):
                yield Piece(*key, range(start, min(start + PIECE, case.num_prompts)))

    def plot_path(self, name: str) -> Path:
        return self.options.out / "results" / f"{name}.png"


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    torch.set_num_threads(1)
    if jobs == 1:
        yield None
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def cluster(name: str) -> ClusterDescription:
    return ClusterDescription.load(ROOT / "clusters" / f"{name}.toml")


def all_clusters() -> list[ClusterDescription]:
    return [ClusterDescription.load(path) for path in sorted((ROOT / "clusters").glob("*.toml"))]
