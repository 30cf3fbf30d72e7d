"""Runs schedules x prompts in the simulator, on several processes if wanted; the results do not depend on how many."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from flowspec.core import DraftDType
from flowspec.emulation.experiment import Experiment
from flowspec.emulation.pairs import ModelPair, SyntheticPair
from flowspec.emulation.simulator import simulate
from flowspec.request.records import RequestRecord

SYNTHETIC = "synthetic"
_CHUNK = 5  # prompts in one piece of work


@dataclass(frozen=True)
class PairSpec:
    """Which models give the tokens."""

    model: str = SYNTHETIC  # or demo, a directory, a hub name
    draft_quality: str = "eagle1"  # of the synthetic language
    draft: str = "auto"  # of a real model
    is_coupled: bool = True  # a real draft guesses with the noise of sampling; no published one does
    draft_dtype: DraftDType = "auto"  # of a real model's draft head

    @property
    def name(self) -> str:
        return f"{SYNTHETIC}:{self.draft_quality}" if self.model == SYNTHETIC else self.model

    def load(self, is_sampled: bool) -> ModelPair:
        """Raises ``UsageError``."""
        if self.model == SYNTHETIC:
            return SyntheticPair(self.draft_quality, is_sampled)
        # Imported here: it brings transformers, which takes longer than all the rest.
        from flowspec.emulation.checkpoint_pair import CheckpointPair

        return CheckpointPair(self.model, self.draft, self.is_coupled, self.draft_dtype)


_load = lru_cache(maxsize=2)(PairSpec.load)


def run_simulated(
    experiment: Experiment,
    pair: PairSpec,
    schedules: Sequence[str],
    prompts: Sequence[str],
    jobs: int = 1,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, list[RequestRecord]]:
    """Every schedule over all prompts, in their order. Raises ``UsageError`` for what cannot be simulated."""
    indexed = list(enumerate(prompts))
    pieces = [(name, indexed[i : i + _CHUNK]) for name in schedules for i in range(0, len(indexed), _CHUNK)]
    if jobs == 1:
        done = []
        for schedule, part in pieces:
            done.append(simulate_piece(experiment, pair, schedule, part))
            progress(len(done) / len(pieces))
    else:
        # Spawned, not forked: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(jobs, len(pieces)), context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            try:
                with _sigint_blocked():
                    futures = [
                        pool.submit(simulate_piece, experiment, pair, schedule, part) for schedule, part in pieces
                    ]
                for num_done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    progress(num_done / len(pieces))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()  # they do not hear Ctrl-C, and nobody needs what they are at
                raise
            done = [future.result() for future in futures]
    records: dict[str, list[RequestRecord]] = {name: [] for name in schedules}
    for (schedule, _), part in zip(pieces, done, strict=True):
        records[schedule] += part
    return records


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes started meanwhile never hear Ctrl-C: this one ends them, and is the only one to speak of it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def simulate_piece(
    experiment: Experiment, pair: PairSpec, schedule: str, prompts: Sequence[tuple[int, str]]
) -> list[RequestRecord]:
    """In this process, which keeps the models for the next piece."""
    return simulate(experiment, _load(pair, experiment.is_sampled), schedule, prompts)
