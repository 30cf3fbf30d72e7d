"""Load on `flowspec serve`, and what HTTP adds to the engine. Prints one JSON object.

    python benchmarks/server.py [--stages 3] [--clients 1,2,4,8,16] [--requests 4] [--pairs 20] [--url URL]

Closed loop: each client sends its next request when the answer to the last one is complete. Every prompt begins
differently, so no cache helps. docs/METHODOLOGY.md defines the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from flowspec.cluster.local import num_cores
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.llm import LLM

START_TIMEOUT_S = 120
ANSWER_TIMEOUT_S = 300
TEMPERATURE = 0.8

STARTS = (
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\n\ndef read_lines(path):\n",
    "def parse_args(argv):\n    parser = argparse.ArgumentParser()\n",
    "class TestServer(unittest.TestCase):\n    def setUp(self):\n",
    "for name, value in sorted(items):\n",
    "try:\n    import json\nexcept ImportError:\n",
    "def copy(source, target, *, follow_symlinks=True):\n",
    "with open(filename, 'rb') as file:\n",
)


def prompt(index: int) -> str:
    return f"# {index}\n{STARTS[index % len(STARTS)]}"


@dataclass(frozen=True)
class Answer:
    """Seen from where the request was sent."""

    start_s: float
    emissions: tuple[tuple[float, int], ...]  # time, and tokens so far
    spec_stats: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return self.emissions[-1][1]

    @property
    def ttft_ms(self) -> float:
        return (self.emissions[0][0] - self.start_s) * 1000

    @property
    def ms_per_token(self) -> float:
        """After the first emission."""
        (first_s, num_first), (last_s, num_last) = self.emissions[0], self.emissions[-1]
        return (last_s - first_s) / (num_last - num_first) * 1000

    @property
    def latencies_ms(self) -> list[float]:
        """One for each token after the first emission; those that came together share the wait."""
        waits = [
            ((time_s - before_s) * 1000, num - num_before)
            for (before_s, num_before), (time_s, num) in pairwise(self.emissions)
        ]
        return [wait_ms / num_new for wait_ms, num_new in waits for _ in range(num_new)]


class Client:
    """One connection, kept open. Does as little as it can: it runs on the cores that it measures."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self._url = urlsplit(url)
        self._max_tokens = max_tokens

    async def __aenter__(self) -> Client:
        host, port = self._url.hostname or "127.0.0.1", self._url.port or 80
        self._reader, self._writer = await asyncio.open_connection(host, port, limit=2**20)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def complete(self, index: int) -> Answer:
        return await asyncio.wait_for(self._complete(index), ANSWER_TIMEOUT_S)

    async def _complete(self, index: int) -> Answer:
        body = {
            "prompt": prompt(index), "seed": index, "temperature": TEMPERATURE, "max_tokens": self._max_tokens,
            "ignore_eos": True, "stream": True, "return_spec_stats": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        start_s = time.perf_counter()
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._url.netloc}\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        arrivals: list[tuple[float, bytes]] = []
        status = await self._reader.readline()
        while not (line := await self._reader.readline()).startswith(b"data: [DONE]"):
            if line.startswith((b"data: ", b"{")):
                arrivals.append((time.perf_counter(), line.removeprefix(b"data: ")))
            if (b" 200 " not in status and arrivals) or not line:
                raise SystemExit(f"the server answered {status.decode()}{arrivals[-1:]}")
        while await self._reader.readline() != b"0\r\n":  # the last chunk
            pass
        await self._reader.readline()
        return _answer(start_s, [(time_s, json.loads(line)) for time_s, line in arrivals])


def _answer(start_s: float, events: list[tuple[float, dict[str, Any]]]) -> Answer:
    emissions: list[tuple[float, int]] = []
    spec_stats: dict[str, Any] = {}
    for time_s, event in events:
        if "error" in event:
            raise SystemExit(f"the server failed: {event['error']['message']}")
        for choice in event["choices"]:
            spec_stats = choice.get("spec_stats", spec_stats)
            if choice["text"]:
                emissions.append((time_s, event["usage"]["completion_tokens"]))
    return Answer(start_s, tuple(emissions), spec_stats)


@contextlib.contextmanager
def serving(model: str, stages: int) -> Iterator[str]:
    """The address of a server of its own."""
    command = [sys.executable, "-m", "flowspec", "serve", "--model", model, "--stages", str(stages), "--port", "0"]
    command += ["--memory-tokens", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                log.seek(0)
                if found := re.search(r"(http://[\d.:]+)/v1", text := log.read()):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not come up:\n{text}")
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


# --- load ---


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 90, 99)}


async def measure_load(url: str, num_clients: int, num_requests: int, max_tokens: int, first: int) -> dict[str, Any]:
    """``num_requests`` of each client; the prompts' indices start at ``first``."""

    async def work(place: int) -> list[Answer]:
        async with Client(url, max_tokens) as client:
            return [await client.complete(first + turn * num_clients + place) for turn in range(num_requests)]

    start_s = time.perf_counter()
    answers = [answer for some in await asyncio.gather(*map(work, range(num_clients))) for answer in some]
    wall_s = time.perf_counter() - start_s
    num_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "requests": len(answers),
        "tokens": num_tokens,
        "tokens_per_s": round(num_tokens / wall_s, 2),
        "time_to_first_token_ms": percentiles([answer.ttft_ms for answer in answers]),
        "inter_token_latency_ms": percentiles([ms for answer in answers for ms in answer.latencies_ms]),
    }


# --- what HTTP adds ---


def run_in_process(llm: LLM, index: int, max_tokens: int) -> Answer:
    """The same request, without HTTP."""
    params = SamplingParams(max_tokens, TEMPERATURE, seed=index, ignore_eos=True)
    start_s = time.perf_counter()
    num_tokens, emissions = 0, list[tuple[float, int]]()
    for chunk in llm.stream(prompt(index), params):
        num_tokens += len(chunk.token_ids)
        emissions += [(time.perf_counter(), num_tokens)] if chunk.text else []
    return Answer(start_s, tuple(emissions), {})


async def measure_overhead(url: str, llm: LLM, num_pairs: int, max_tokens: int, first: int) -> dict[str, Any]:
    """One client; server and process take turns, each with the first turn every other time."""
    pairs: list[tuple[Answer, Answer]] = []
    async with Client(url, max_tokens) as client:
        for index in range(first, first + num_pairs):
            if index % 2:
                pairs.append((await client.complete(index), run_in_process(llm, index, max_tokens)))
            else:
                inner = run_in_process(llm, index, max_tokens)
                pairs.append((await client.complete(index), inner))
    outer, inside = [served for served, _ in pairs], [inner for _, inner in pairs]
    told = [(a.spec_stats["time_to_first_token_ms"], a.spec_stats["mean_inter_token_latency_ms"]) for a in outer]
    seen = {
        "client": [(answer.ttft_ms, answer.ms_per_token) for answer in outer],
        "server_engine": told,
        "in_process": [(answer.ttft_ms, answer.ms_per_token) for answer in inside],
    }
    return {
        "pairs": num_pairs,
        **{name: {"ttft_ms": _median(f for f, _ in runs), "ms_per_token": _median(t for _, t in runs)}
           for name, runs in seen.items()},
        "added_to_server_engine": _added(seen["client"], told),
        "added_to_in_process": _added(seen["client"], seen["in_process"]),
    }  # fmt: skip


def _added(outer: list[tuple[float, float]], inner: list[tuple[float, float]]) -> dict[str, float]:
    """Runs in pairs, each with its time to first token and its time per token."""
    per_token = [statistics.median(ms for _, ms in runs) for runs in (outer, inner)]
    ratios = [ms / other for (_, ms), (_, other) in zip(outer, inner, strict=True)]
    return {
        "ttft_ms": _median(first - other for (first, _), (other, _) in zip(outer, inner, strict=True)),
        "per_token_percent": round((per_token[0] / per_token[1] - 1) * 100, 2),
        "per_token_percent_by_pair": round((statistics.median(ratios) - 1) * 100, 2),
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    max_tokens, first = arguments.max_tokens, 0
    async with Client(url, max_tokens) as client:
        for index in range(arguments.warm_up):
            await client.complete(10**6 + index)
    load: dict[str, Any] = {}
    for num_clients in arguments.clients:
        load[str(num_clients)] = await measure_load(url, num_clients, arguments.requests, max_tokens, first)
        first += num_clients * arguments.requests
    figures: dict[str, Any] = {"load_by_clients": load}
    if arguments.pairs:
        with LLM(arguments.model, stages=arguments.stages, config=EngineConfig(memory_tokens=0)) as llm:
            for index in range(arguments.warm_up):
                run_in_process(llm, 10**6 + index, max_tokens)
            figures["http_overhead"] = await measure_overhead(url, llm, arguments.pairs, max_tokens, first)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="a running server of the same model and stages; else one is started")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--stages", type=int, default=3, help="worker processes")
    parser.add_argument("--clients", default="1,2,4,8,16", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each request")
    parser.add_argument("--warm-up", type=int, default=4, help="requests before; auto learns what pays off")
    parser.add_argument("--pairs", type=int, default=20, help="of runs with and without HTTP; 0: none")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(serving(arguments.model, arguments.stages))
        figures = asyncio.run(measure(url.removesuffix("/v1"), arguments))
    names = ("model", "stages", "max_tokens")
    print(json.dumps({name: getattr(arguments, name) for name in names} | {"cores": num_cores()} | figures, indent=2))


if __name__ == "__main__":
    main()
