"""How long a killed worker keeps a text waiting, against what starting it, loading its stage and a prefill take alone.

    python benchmarks/recovery.py [--kills 9] [--stages 3] [--model demo] [--json]

Real worker processes on this machine. A generation is at its 64th token when a worker gets SIGKILL; **recovery** is the
time from there to the next token. Alone: **start**: from the kill of the only worker of a machine until its successor
answers a connection; **load**: of the stage that was lost, as its new worker tells; **prefill**: the time to the first
token of a request that begins with the text so far, with nothing kept of it. Medians; the ratio is taken kill by kill.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
from typing import Any

from flowspec.bench.report import markdown_table
from flowspec.cluster.connections import RemoteConnections
from flowspec.cluster.local import LocalProcesses, local_threads
from flowspec.config import EngineConfig, LinkConfig
from flowspec.core import SamplingParams
from flowspec.errors import WorkerError
from flowspec.llm import LLM

PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
NUM_BEFORE = 64  # tokens
POLL_S = 0.002


def start_alone_s(threads: int) -> float:
    """Until a killed worker's successor answers."""
    launcher = LocalProcesses(1, threads, "cpu")
    try:
        wait_for_answer(launcher)
        killed = launcher.pids[1]
        os.kill(killed, signal.SIGKILL)
        start_s = time.perf_counter()
        while launcher.pids.get(1, killed) == killed:
            try:
                launcher.check()
            except WorkerError:
                continue
            time.sleep(POLL_S)
        wait_for_answer(launcher)
        return time.perf_counter() - start_s
    finally:
        launcher.close()


def wait_for_answer(launcher: LocalProcesses) -> None:
    connections = RemoteConnections(launcher, LinkConfig())
    while not connections.is_up(1):
        connections.receive(POLL_S)
    launcher.check()
    connections.end_session()


def recovery_s(llm: LLM, stage: int) -> tuple[float, list[int]]:
    """From the kill to the next token; and the text's tokens until then."""
    engine = llm.engine
    launcher = engine.pipeline.launcher
    assert isinstance(launcher, LocalProcesses), "they run here"
    params = SamplingParams(2 * NUM_BEFORE, ignore_eos=True)
    job = engine.submit(llm.encode(PROMPT), params)
    while len(job.output_ids) < NUM_BEFORE:
        engine.step()
    os.kill(launcher.pids[stage], signal.SIGKILL)
    start_s, num_recoveries, tokens = time.perf_counter(), engine.status().num_recoveries, list(job.output_ids)
    while engine.status().num_recoveries == num_recoveries:
        engine.step()
        tokens = list(job.output_ids)  # some more were on their way
    while len(job.output_ids) == len(tokens):
        engine.step()
    taken_s = time.perf_counter() - start_s
    while not job.is_finished:
        engine.step()
    return taken_s, tokens


def prefill_s(llm: LLM, text_ids: list[int]) -> float:
    start_s = time.perf_counter()
    llm.generate(text_ids, SamplingParams(1, ignore_eos=True))
    return time.perf_counter() - start_s


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    rows: list[dict[str, float]] = []
    config = EngineConfig(keeps_caches=False)
    with LLM(arguments.model, stages=arguments.stages, config=config) as llm:
        for number in range(arguments.kills):
            stage = number % arguments.stages + 1
            taken_s, tokens = recovery_s(llm, stage)
            row = {
                "recovery": taken_s,
                "start alone": start_alone_s(local_threads(arguments.stages)),
                "load alone": llm.engine.pipeline.ready[stage - 1].load_s,
                "prefill alone": prefill_s(llm, [*llm.encode(PROMPT), *tokens]),
            }
            rows.append(row | {"ratio": taken_s / (sum(row.values()) - taken_s)})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--stages", type=int, default=3, help="worker processes")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures: dict[str, Any] = measure(arguments)
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        cells = [[name, f"{value:.2f}" + (" s" if name != "ratio" else "")] for name, value in figures.items()]
        print(markdown_table([f"{arguments.kills} kills, {arguments.stages} workers", "median"], cells))


if __name__ == "__main__":
    main()
