"""Hundreds of requests that come, go, stop and are given up, many at once, on one server."""

from __future__ import annotations

import asyncio
import os
import time
from random import Random
from typing import Any

import httpx
import openai

from flowspec import LLM, SamplingParams
from server_process import ServerProcess

NUM_REQUESTS = int(os.environ.get("FLOWSPEC_SOAK_REQUESTS", "160"))
NUM_CLIENTS = 16
NUM_KINDS = 30  # different requests; each comes several times
LATER_S = 60.0  # memory is compared with what it was at this time, or at half of the run
GROWTH_BYTES = 16 * 2**20  # of all processes; what lasts longer than its request grows with their number


def kinds(random: Random) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for i in range(NUM_KINDS):
        prompt = f"# {i}\n" + random.choice(["def f(x):\n", "class A:\n    pass\n" * 8, "import os\n", "x = [1, 2"])
        options: dict[str, Any] = {"prompt": prompt, "max_tokens": random.randint(1, 60), "temperature": 0.0}
        if random.random() < 0.5:
            options |= {"temperature": random.choice([0.5, 1.0]), "seed": random.randrange(1000)}
        if random.random() < 0.4:
            options["stop"] = random.choice([["\n\n"], [")", "self"], ["e", "never"]])
        made.append(options)
    return made


def alone(llm: LLM, options: dict[str, Any]) -> tuple[str, str]:
    params = SamplingParams(
        options["max_tokens"], options["temperature"], seed=options.get("seed"), stop=tuple(options.get("stop", ()))
    )
    completion = llm.generate(options["prompt"], params)
    return completion.text, completion.finish_reason


def memory_bytes(server: ServerProcess) -> int:
    return sum(process.memory_info().rss for process in (server.process, *server.workers()))


Finished = list[tuple[int, str, str]]  # (kind of request, its text, why it ended)


async def soak(server: ServerProcess, chosen: list[dict[str, Any]]) -> tuple[Finished, tuple[int, int], int]:
    """All that were not given up; memory some time after the start and at the end; how many were given up."""
    random, num_cancelled = Random(1), 0
    finished: Finished = []
    todo = iter(range(NUM_REQUESTS))
    start = time.monotonic()
    half: int | None = None
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3, timeout=120) as client:

        async def one_client() -> None:
            nonlocal num_cancelled, half
            for number in todo:
                kind = random.randrange(NUM_KINDS)
                stream = await client.completions.create(model="demo", stream=True, **chosen[kind])
                gives_up_after = random.randrange(8) if random.random() < 0.25 else None
                text, reason, num_chunks = "", "", 0
                async for chunk in stream:
                    text += chunk.choices[0].text
                    reason = chunk.choices[0].finish_reason or reason
                    num_chunks += 1
                    if num_chunks - 1 == gives_up_after and not reason:
                        await stream.close()
                        break
                if reason:
                    finished.append((kind, text, reason))
                else:
                    num_cancelled += 1
                if half is None and (time.monotonic() - start > LATER_S or number > NUM_REQUESTS // 2):
                    half = memory_bytes(server)

        await asyncio.gather(*(one_client() for _ in range(NUM_CLIENTS)))
    assert half is not None
    return finished, (half, memory_bytes(server)), num_cancelled


def test_every_answer_of_a_busy_server_is_the_one_given_alone_and_nothing_leaks() -> None:
    chosen = kinds(Random(0))
    with LLM("demo", stages=1, in_process=True, draft="none", schedule="ar") as llm:
        expected = [alone(llm, options) for options in chosen]
    with ServerProcess("--stages", "3", "--max-waiting", "64") as server:
        finished, (half, end), num_cancelled = asyncio.run(soak(server, chosen))
        assert len(finished) + num_cancelled == NUM_REQUESTS
        assert len(finished) > NUM_REQUESTS // 2 and num_cancelled > NUM_REQUESTS // 20
        wrong = [
            (chosen[kind], text, expected[kind]) for kind, text, reason in finished if (text, reason) != expected[kind]
        ]
        assert not wrong, wrong[:3]
        assert {reason for _, _, reason in finished} == {"stop", "length"}
        assert end - half < GROWTH_BYTES, f"memory grew from {half >> 20} to {end >> 20} MiB"
        # An idle worker checks its slots, and a failed check ends the engine.
        deadline = time.monotonic() + 10
        while (metric(server, "num_requests_running") or metric(server, "kv_cache")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert metric(server, "num_requests_running") == metric(server, "kv_cache") == 0
        assert httpx.get(f"{server.url}/health").status_code == 200


def metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"flowspec:{name}"))
