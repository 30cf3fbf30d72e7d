"""Kills and stops workers in the middle of generations, and compares the texts with undisturbed ones. Prints a table.

    python benchmarks/chaos.py [--elsewhere] [--requests 60] [--faults 40] [--stages 3] [--seed 0] [--json]

Real worker processes, which the driver has started and starts again; ``--elsewhere``: as on other machines, where
somebody else starts them again, and behind links that are cut, and fall silent, too. Half of the requests are sampled,
some have penalties, some stop strings. Faults come after a number of tokens that the seed decides, at prompts too,
since every recovery computes them again, and every fourth one in the middle of the recovery from the one before. Exit
code 1 when a text differs, or something is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import psutil

from elsewhere import Link, WorkerElsewhere
from flowspec.bench.report import markdown_table
from flowspec.cluster.local import LocalProcesses
from flowspec.config import EngineConfig, LinkConfig
from flowspec.core import SamplingParams
from flowspec.engine.recovery import MAX_LOSSES
from flowspec.llm import LLM, Run

PROMPTS = (
    "def main(", "class Queue:\n    def __init__(self", "import os\n", "for i in range(", "try:\n    ",
    "def read(self, n", "    return self._", "if __name__ ==",
)  # fmt: skip
STOPS = ((), (), ("return",), ("\n\n",))
SCHEDULES = ("flow", "auto", "ar", "lockstep")
CUT_S = 1.0
MAX_GROWTH_MB = 50


@dataclass(frozen=True)
class Fault:
    num_tokens: int  # of all requests together, after which it happens
    kind: str
    stage: int
    in_recovery: bool  # in that from the fault before, if it is still under way
    delay_s: float  # after its beginning


@dataclass
class Done:
    """One pass over all requests."""

    texts: list[tuple[str, list[int]]]
    num_faults: Counter[str] = field(default_factory=Counter[str])
    gaps_s: list[float] = field(default_factory=list)  # between the tokens before and after a loss


class Workers(Protocol):
    """What faults happen to."""

    @property
    def kinds(self) -> Sequence[str]:
        """Of faults; what stands there twice is as often again."""
        ...

    def hit(self, kind: str, stage: int) -> bool:
        """False: there is nobody yet."""
        ...


class OwnWorkers:
    """Processes that the driver has started."""

    kinds = ("kill", "kill", "stop")

    def __init__(self, llm: LLM) -> None:
        launcher = llm.engine.pipeline.launcher
        assert isinstance(launcher, LocalProcesses), "they run here"
        self._launcher = launcher

    def hit(self, kind: str, stage: int) -> bool:
        pid = self._launcher.pids.get(stage)
        if pid is None:
            return False  # it will be there soon
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        return True


class OtherWorkers:
    """Processes that somebody else starts again, on links of their own. What stands still goes on after a while."""

    kinds = ("kill", "kill", "stop", "cut", "cut", "silence")

    def __init__(self, workers: Sequence[WorkerElsewhere], links: Sequence[Link], heartbeat_timeout_s: float) -> None:
        self._workers, self._links = workers, links
        self._away_s = 1.5 * heartbeat_timeout_s  # long enough to be missed

    def hit(self, kind: str, stage: int) -> bool:
        worker, link = self._workers[stage - 1], self._links[stage - 1]
        match kind:
            case "kill":
                worker.kill()
            case "stop":
                worker.send_signal(signal.SIGSTOP)
                waking = threading.Timer(self._away_s, worker.send_signal, [signal.SIGCONT])
                waking.daemon = True
                waking.start()
            case "cut":
                link.cut(CUT_S)
            case _:
                link.silence(self._away_s)
        return True


def plan(num_faults: int, num_tokens: int, num_stages: int, kinds: Sequence[str], rng: Random) -> list[Fault]:
    """Over all but the last tenth of the tokens, in their order."""
    places = sorted(rng.randrange(max(1, num_tokens * 9 // 10)) for _ in range(num_faults))
    places = [places[number - (number % 4 == 3)] for number in range(num_faults)]
    return [
        Fault(place, rng.choice(kinds), rng.randint(1, num_stages), number % 4 == 3, rng.random() / 2)
        for number, place in enumerate(places)
    ]


def all_params(num_requests: int, max_tokens: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            max_tokens,
            temperature=number % 2 * 0.8,
            seed=number,
            frequency_penalty=number % 3 * 0.2,
            stop=STOPS[number % len(STOPS)],
            ignore_eos=True,
        )
        for number in range(num_requests)
    ]


class Chaos:
    """Faults on their way, while an engine runs."""

    def __init__(self, llm: LLM, workers: Workers, faults: Sequence[Fault]) -> None:
        self._engine = llm.engine
        self._workers = workers
        self._left = list(faults)
        self._since_token: dict[int, int] = {}  # faults by stage
        self._num_recoveries = -1  # when the last fault happened
        self._recovery_s: float | None = None  # since when one is under way
        self._last_token_s = time.perf_counter()
        self._gap_start_s: float | None = None  # the last token before a loss from which no token has come yet
        self.num_faults: Counter[str] = Counter()
        self.gaps_s: list[float] = []

    def note_tokens(self) -> None:
        self._last_token_s = time.perf_counter()
        self._since_token.clear()
        if self._gap_start_s is not None:
            self.gaps_s.append(self._last_token_s - self._gap_start_s)
            self._gap_start_s = None

    def after_step(self, num_tokens: int) -> None:
        """See what has happened, and do what is due."""
        now = time.perf_counter()
        if self._engine.status().problem is None:
            self._recovery_s = None
        elif self._recovery_s is None:
            self._recovery_s = now
            self._gap_start_s = self._gap_start_s or self._last_token_s
        if self._left and num_tokens >= self._left[0].num_tokens and self._is_time_for(self._left[0], now):
            self._hit(self._left[0])

    def _is_time_for(self, fault: Fault, now: float) -> bool:
        """What would look like a crash loop waits for a token."""
        if self._since_token.get(fault.stage, 0) > MAX_LOSSES - 2:
            return False
        if self._recovery_s is not None:
            return fault.in_recovery and now - self._recovery_s >= fault.delay_s
        is_over = self._engine.status().num_recoveries > self._num_recoveries
        return is_over or not fault.in_recovery

    def _hit(self, fault: Fault) -> None:
        if not self._workers.hit(fault.kind, fault.stage):
            return
        self._left.pop(0)
        self._since_token[fault.stage] = self._since_token.get(fault.stage, 0) + 1
        self._num_recoveries = self._engine.status().num_recoveries
        self.num_faults[fault.kind] += 1


def run_all(llm: LLM, workers: Workers, params: Sequence[SamplingParams], faults: Sequence[Fault] = ()) -> Done:
    engine, chaos = llm.engine, Chaos(llm, workers, faults)
    runs = [
        Run(engine, engine.submit(llm.encode(PROMPTS[i % len(PROMPTS)]), each, SCHEDULES[i % len(SCHEDULES)]))
        for i, each in enumerate(params)
    ]
    texts = [""] * len(runs)
    numbers = {run.job.request.request_id: number for number, run in enumerate(runs)}
    num_tokens = 0
    while not all(run.is_finished for run in runs):
        for job in engine.step(0.05):
            number = numbers[job.request.request_id]
            chunk = runs[number].read()
            if job.error is not None:
                raise job.error
            texts[number] += chunk.text
            num_tokens += len(chunk.token_ids)
            if chunk.token_ids:
                chaos.note_tokens()
        chaos.after_step(num_tokens)
    ids = [run.job.output_ids[: run.num_tokens] for run in runs]
    return Done(list(zip(texts, ids, strict=True)), chaos.num_faults, chaos.gaps_s)


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[tuple[LLM, Workers]]:
    heartbeat_s, num_stages = arguments.heartbeat_timeout, arguments.stages
    link, config = LinkConfig(heartbeat_timeout_s=heartbeat_s), EngineConfig(max_running=4)
    with ExitStack() as stack:
        if not arguments.elsewhere:
            llm = stack.enter_context(LLM(arguments.model, stages=num_stages, link=link, config=config))
            yield llm, OwnWorkers(llm)
            return
        workers = [stack.enter_context(WorkerElsewhere()) for _ in range(num_stages)]
        links = [Link(worker.address) for worker in workers]
        for each in links:
            stack.callback(each.close)
        addresses = [each.address for each in links]
        llm = stack.enter_context(LLM(arguments.model, workers=addresses, link=link, config=config))
        yield llm, OtherWorkers(workers, links, heartbeat_s)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = Random(arguments.seed)
    params = all_params(arguments.requests, arguments.max_new_tokens)
    own = psutil.Process()
    children = {child.pid for child in own.children(recursive=True)}
    with opened(arguments) as (llm, workers):
        undisturbed = run_all(llm, workers, params)
        num_open, memory = own.num_fds(), own.memory_info().rss
        num_tokens = sum(len(ids) for _, ids in undisturbed.texts)
        faults = plan(arguments.faults, num_tokens, arguments.stages, workers.kinds, rng)
        disturbed = run_all(llm, workers, params, faults)
        status, has_links = llm.engine.status(), arguments.elsewhere
        num_open, memory = own.num_fds() - num_open, own.memory_info().rss - memory
    left = [child for child in own.children(recursive=True) if child.pid not in children]
    _, alive = psutil.wait_procs(left, timeout=5)
    pairs = zip(undisturbed.texts, disturbed.texts, strict=True)
    return {
        "requests": len(params),
        "tokens": num_tokens,
        "stages": arguments.stages,
        **{f"faults_{kind}": disturbed.num_faults[kind] for kind in dict.fromkeys(workers.kinds)},
        "recoveries": status.num_recoveries,
        "seconds_without_token_median": statistics.median(disturbed.gaps_s) if disturbed.gaps_s else 0.0,
        "seconds_without_token_max": max(disturbed.gaps_s, default=0.0),
        "driver_growth_mb": memory / 1e6,
        "differences": sum(one != other for one, other in pairs),
        "slots_held": status.num_slots_held,
        "files_left_open": 0 if has_links else num_open,  # links keep some open for ends that are gone
        "processes_left": len(alive),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elsewhere", action="store_true", help="workers as on other machines, and faulty links")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--faults", type=int, default=40, help="at most: what comes too late is none")
    parser.add_argument("--stages", type=int, default=3, help="worker processes")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of one request")
    parser.add_argument("--heartbeat-timeout", type=float, default=LinkConfig.heartbeat_timeout_s, metavar="SECONDS")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--json", action="store_true")
    figures = measure(parser.parse_args())
    if "--json" in sys.argv:
        print(json.dumps(figures, indent=2))
    else:
        rows = [[name.replace("_", " "), f"{value:.4g}"] for name, value in figures.items()]
        print(markdown_table(["what", "figure"], rows))
    is_left = any(figures[name] > 0 for name in ("differences", "slots_held", "files_left_open", "processes_left"))
    if is_left or figures["driver_growth_mb"] > MAX_GROWTH_MB:
        sys.exit(1)


if __name__ == "__main__":
    main()
