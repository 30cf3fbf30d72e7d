"""A server over workers elsewhere, whose devices lose power, sleep, and lose their server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowspec import LLM, SamplingParams
from flowspec.config import LinkConfig
from flowspec.errors import WorkerError
from server_process import ServerProcess
from worker_process import WorkerProcess

PROMPT = "t3 t4"
WAIT_S = 60.0
TWO = """
[[device]]
name = "kitchen"
address = "{0}"
[[device]]
name = "attic"
address = "{1}"
"""


@pytest.fixture
def workers() -> Iterator[list[WorkerProcess]]:
    """Two; a test may put others in their places."""
    started = [WorkerProcess(f"127.0.0.{host}") for host in (2, 3)]
    yield started
    for worker in started:
        worker.end()


def health(server: ServerProcess) -> dict[str, Any]:
    return httpx.get(f"{server.url}/health?verbose=1", timeout=10).json()


def await_health(server: ServerProcess, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_S
    while (told := health(server))["status"] != status:
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    return told


class Completion:
    """One request, in a thread of its own."""

    def __init__(self, server: ServerProcess) -> None:
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0.8, "seed": 5, "frequency_penalty": 0.3}
        self._answer: httpx.Response | None = None

        def ask() -> None:
            self._answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S)

        self._thread = threading.Thread(target=ask)
        self._thread.start()

    def text(self) -> str:
        self._thread.join(WAIT_S)
        assert self._answer is not None and self._answer.status_code == 200, self._answer
        return self._answer.json()["choices"][0]["text"]


def test_requests_wait_for_devices_that_are_away_and_weights_for_a_server_that_is(
    tmp_path: Path, checkpoint_dir: Callable[[str], Path], workers: list[WorkerProcess]
) -> None:
    directory = checkpoint_dir("llama")
    with LLM(directory, stages=1, in_process=True, draft="none", schedule="ar") as llm:
        expected = llm.generate(PROMPT, SamplingParams(200, 0.8, seed=5, frequency_penalty=0.3)).text
    (tmp_path / "home.toml").write_text(TWO.format(*(worker.address for worker in workers)))
    options = ["--model", str(directory), "--cluster", str(tmp_path / "home.toml"), "--heartbeat-timeout", "1.5"]
    with ServerProcess(*options) as server:
        running = Completion(server)
        host, _, port = workers[1].address.rpartition(":")
        workers[1].kill()
        told = await_health(server, "degraded")
        assert told["problem"].startswith("worker 2 (attic) is away for ") and "127.0.0" not in told["problem"]
        assert [stage["state"] for stage in told["stages"]][1] == "away"
        waiting = Completion(server)
        workers[1] = without_power = WorkerProcess(host, int(port))
        assert running.text() == waiting.text() == expected
        await_health(server, "ok")
        assert "are still here" in workers[0].log and "are still here" not in without_power.log

        running = Completion(server)
        workers[0].stop()
        assert await_health(server, "degraded")["problem"].startswith("worker 1 (kitchen) is away")
        plain = httpx.get(f"{server.url}/health")
        assert plain.status_code == 200 and plain.json()["status"] == "degraded"
        workers[0].go_on()
        assert running.text() == expected
        # A server that is killed leaves the workers waiting, with what they have loaded.
        counts = [worker.log.count("are still here") for worker in workers]
        ended = [worker.log.count("waiting for a driver") for worker in workers]
        server.process.kill()
    deadline = time.monotonic() + WAIT_S
    while any(worker.log.count("waiting for a driver") == num for worker, num in zip(workers, ended, strict=True)):
        assert time.monotonic() < deadline, [worker.log for worker in workers]
        time.sleep(0.05)
    with ServerProcess(*options) as server:
        assert Completion(server).text() == expected
    assert all(worker.log.count("are still here") > count for worker, count in zip(workers, counts, strict=True))


def test_a_device_that_stays_away_is_an_error_that_names_it(
    checkpoint_dir: Callable[[str], Path], workers: list[WorkerProcess]
) -> None:
    link = LinkConfig(heartbeat_timeout_s=1.5, rejoin_timeout_s=1.0)
    places = [worker.address for worker in workers]
    with LLM(checkpoint_dir("llama"), workers=places, names=["kitchen", "attic"], link=link) as llm:
        stream = llm.stream(PROMPT, SamplingParams(200))
        next(stream)
        workers[1].kill()
        workers.pop()
        with pytest.raises(WorkerError, match=r"worker 2 \(attic\) was away for 1 s: .*; start it again"):
            list(stream)


def test_a_worker_may_start_after_its_driver_and_the_one_before_it(
    checkpoint_dir: Callable[[str], Path], workers: list[WorkerProcess]
) -> None:
    """The first one waits with its layers loaded for as long as its driver does."""
    early, late = workers
    places = [worker.address for worker in workers]
    late.kill()
    made: list[LLM] = []
    opening = threading.Thread(target=lambda: made.append(LLM(checkpoint_dir("llama"), workers=places)))
    opening.start()
    deadline = time.monotonic() + WAIT_S
    while "are ready" not in early.log:
        assert time.monotonic() < deadline, early.log
        time.sleep(0.05)
    workers[1] = WorkerProcess("127.0.0.3", int(places[1].rpartition(":")[2]))
    opening.join(WAIT_S)
    (llm,) = made
    with llm:
        assert llm.generate(PROMPT, SamplingParams(8)).num_tokens == 8
