"""Thousands of clusters in which devices die, hang, restart and lose their links, each differently; no text changes.

    python benchmarks/simulated_chaos.py [--seeds 2000] [--first 0] [--jobs 2] [--json]
    python benchmarks/simulated_chaos.py --first 1234 --seeds 1 --verbose

The engine, its recovery, the driver and the workers are the real ones; the model is the synthetic language, whose text
changes with every wrong mask; devices, links and time are played. A seed decides all: three requests (greedy or
sampled, with penalties and stop tokens, by any schedule), whether the workers are processes of the driver's machine or
devices elsewhere, how much memory their caches have, when which fault comes (also in the middle of prompts, of loading,
and of the recovery from another fault), how long it lasts, and the order of all messages and all work between. A device
elsewhere may stay away for good: its layers go to the others. Exit code 1, and the command that repeats it, for each
seed that fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from types import SimpleNamespace
from typing import Any

from flowspec.cluster.launcher import RunningWorkers
from flowspec.config import EngineConfig, LinkConfig, ScheduleConfig
from flowspec.core import Partition, SamplingParams
from flowspec.emulation.pairs import SyntheticPair
from flowspec.engine.engine import Engine
from flowspec.engine.job import Job
from flowspec.engine.pipeline import Pipeline, PipelineSpec
from flowspec.engine.recovery import Recovery
from flowspec.model.synthetic import VOCAB_SIZE
from simulated.faulty_cluster import FaultyCluster, LocalLauncher, PlayedConnections

SCHEDULES = ("flow", "flow", "auto", "ar", "serial", "chunked", "pipedec", "lockstep")
NUM_KINDS = 48  # of requests, from which each seed takes three
NUM_LAYERS = 12
LINK = LinkConfig(stall_timeout_s=1e6, start_timeout_s=30.0)
SIZES = SimpleNamespace(name="synthetic", full_name="synthetic", hidden_size=4, vocab_size=VOCAB_SIZE,
                        max_positions=4096, eos_token_ids=frozenset(), num_layers=NUM_LAYERS)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Of a request."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams


@lru_cache
def pair() -> SyntheticPair:
    return SyntheticPair("eagle1")


def kind_of(number: int) -> Kind:
    random = Random(f"kind {number}")
    return Kind(
        tuple(random.randrange(VOCAB_SIZE) for _ in range(random.choice([1, 9, 40, 150]))),
        SamplingParams(
            random.randrange(8, 48),
            temperature=number % 2 * 0.8,
            seed=number,
            frequency_penalty=number % 3 * 0.2,
            repetition_penalty=1.0 + number % 5 % 2 * 0.1,
            stop_token_ids=frozenset([random.randrange(VOCAB_SIZE)] if number % 4 == 3 else []),
        ),
    )


def engine_of(cluster: FaultyCluster, num_stages: int, config: EngineConfig) -> Engine:
    """Over workers that are played."""
    partition = Partition.even(NUM_LAYERS, num_stages)
    workers = None if cluster.is_local else cluster.addresses
    checkpoint: Any = SIZES
    spec = PipelineSpec(checkpoint, partition, workers, link=LINK)
    launcher = LocalLauncher(cluster) if cluster.is_local else RunningWorkers(cluster.addresses)

    def connect(spec: PipelineSpec, launcher: Any) -> PlayedConnections:
        return PlayedConnections(cluster, pair(), spec, launcher, LINK.heartbeat_timeout_s)

    pipeline = Pipeline(spec, connect(spec, launcher), launcher)
    pipeline.await_ready(lambda done: None)
    model: Any = SimpleNamespace(
        checkpoint=checkpoint, head=pair().head, source=pair().source, turn_end_ids=(), memory=None
    )
    recovery = Recovery(pipeline, connect, cluster.clock, cluster.sleep)
    return Engine(pipeline, model, "flow", ScheduleConfig(), config, recovery)


@lru_cache(maxsize=NUM_KINDS)
def plain_text(number: int) -> tuple[int, ...]:
    """Of plain decoding, on one device that nothing happens to."""
    kind = kind_of(number)
    with engine_of(FaultyCluster(Random(0), 1, is_local=True), 1, EngineConfig()) as engine:
        job = engine.submit(kind.prompt_ids, kind.params, "ar")
        while not job.is_finished:
            engine.step()
        return tuple(job.output_ids)


def run_seed(seed: int) -> Counter[str]:
    """What has happened. Raises ``AssertionError``, or what the engine has met, for a seed that fails."""
    random = Random(seed)
    num_stages = random.randint(1, 4)
    cluster = FaultyCluster(random, num_stages, is_local=random.random() < 0.5)
    kv_slots = random.choice([0, 0, 900])
    engine = engine_of(cluster, num_stages, EngineConfig(kv_slots=kv_slots, max_running=random.randint(1, 3)))
    numbers = [random.randrange(NUM_KINDS) for _ in range(3)]
    jobs: list[Job] = []
    cluster.plan_faults(random.randint(1, 6))
    num_tokens, num_steps = 0, 0
    while len(jobs) < len(numbers) or not all(job.is_finished for job in jobs):
        if len(jobs) < len(numbers) and random.random() < 0.1:
            kind = kind_of(numbers[len(jobs)])
            jobs.append(engine.submit(kind.prompt_ids, kind.params, random.choice(SCHEDULES)))
        engine.step()
        if (num_now := sum(len(job.output_ids) for job in jobs)) > num_tokens:
            num_tokens = num_now
            cluster.note_progress()
        num_steps += 1
        assert num_steps < 200_000, f"it does not end: {engine.status().problem}"
    for number, job in zip(numbers, jobs, strict=True):
        assert job.error is None, job.error
        assert tuple(job.output_ids) == plain_text(number), f"another text by {job.schedule}"
    while engine._driver.num_open or engine.status().problem is not None:  # their caches are on their way out
        engine.step()
    status = engine.status()
    assert status.num_slots_held == 0, "slots have leaked"
    connections = engine.pipeline.connections
    assert isinstance(connections, PlayedConnections)
    connections.check_integrity()
    engine.close()
    return cluster.counts + Counter(recoveries=status.num_recoveries, tokens=num_tokens)


def try_seed(seed: int) -> tuple[int, Counter[str], str | None]:
    """With the fault that it met."""
    try:
        return seed, run_seed(seed), None
    except Exception:
        return seed, Counter(), traceback.format_exc()


def run_all(seeds: Sequence[int], num_jobs: int) -> tuple[Counter[str], list[int]]:
    """What has happened, and the seeds that fail."""
    counts: Counter[str] = Counter()
    failed: list[int] = []
    with ProcessPoolExecutor(num_jobs) as pool:
        for seed, counted, fault in pool.map(try_seed, seeds, chunksize=20):
            counts += counted
            if fault is not None:
                failed.append(seed)
                print(
                    f"{fault}python benchmarks/simulated_chaos.py --first {seed} --seeds 1 --verbose", file=sys.stderr
                )
    return counts, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--verbose", action="store_true", help="tell what happens")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("flowspec").setLevel(logging.DEBUG if arguments.verbose else logging.CRITICAL)
    logging.basicConfig(format="%(message)s")
    start_s = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    counts, failed = run_all(seeds, arguments.jobs)
    figures = {"seeds": len(seeds), "failed": len(failed), "seconds": time.perf_counter() - start_s, **counts}
    print(json.dumps(figures, indent=2) if arguments.json else "  ".join(f"{k} {v:.6g}" for k, v in figures.items()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
