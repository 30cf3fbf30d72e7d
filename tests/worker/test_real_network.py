"""Five machines with a switch between them: joined by token, weights streamed, a cable that is pulled; exact text."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowspec import LLM, SamplingParams
from flowspec.cluster.membership import Membership
from flowspec.model.demo_pair import demo_directory, demo_draft_directory
from logged_process import LoggedProcess
from machines import environment, network_of
from namespaces import Network

PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
NUM_TOKENS = 150


@pytest.fixture
def network() -> Iterator[Network]:
    with network_of(5, 150) as made:
        yield made


class Machine:
    """With a worker that has joined, or waits to."""

    def __init__(self, network: Network, place: int, hidden: Path, folder: Path, *arguments: str) -> None:
        """``hidden``: a folder that is empty there."""
        listen = f"{network.address(place)}:7070"
        command = ["worker", "--threads", "1", "--listen", listen, "--name", f"box-{place}", *arguments]
        before = network.inside_without(place, hidden)
        self._running = LoggedProcess(command, f"listening on tcp://{listen}", before, env=environment(folder, place))

    def comes_up(self) -> bool:
        return self._running.comes_up(120)

    @property
    def log(self) -> str:
        return self._running.log

    def end(self) -> str:
        """What it has said."""
        self._running.process.terminate()
        self._running.wait(20)
        return self._running.log


def test_five_machines_give_the_text_of_plain_decoding(network: Network, tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    shutil.copytree(demo_directory(), model)
    shutil.copytree(demo_draft_directory(), model / "draft")
    with LLM(model, stages=1, in_process=True) as llm:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=3)
        plain = llm.generate(PROMPT, params, schedule="ar")
    assert len(plain.token_ids) == NUM_TOKENS

    def flowspec(*arguments: str, **options: Any) -> Any:
        command = [*network.inside(0), sys.executable, "-m", "flowspec", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path, 0), **options
        )

    token = str(Membership.init(tmp_path / "state0").new_token())
    machines = [Machine(network, place, model.parent, tmp_path, "--join", token) for place in range(1, 5)]
    addresses = ",".join(f"{network.address(place)}:7070" for place in range(1, 5))
    generate = ["generate", PROMPT, "--model", str(model), "--workers", addresses, "--schedule", "flow"]
    generate += ["--max-new-tokens", str(NUM_TOKENS), "--temperature", "0.8", "--seed", "3"]
    try:
        assert all(machine.comes_up() for machine in machines), [machine.log for machine in machines]
        first = flowspec(*generate)
        text, told = first.communicate(timeout=200)
        assert first.returncode == 0, told.decode()
        assert plain.text in text.decode()
        # Again, from their disks; and somebody pulls a cable in the middle.
        second = flowspec(*generate, "--heartbeat-timeout", "1.5", bufsize=0)
        begun = second.stdout.read(10)
        network.set_link(3, is_up=False)
        time.sleep(2.5)
        network.set_link(3, is_up=True)
        text, told = second.communicate(timeout=200)
        assert second.returncode == 0, told.decode()
        assert plain.text in (begun + text).decode()
        assert "requests wait until it is back" in told.decode()
    finally:
        logs = [machine.end() for machine in machines]
    assert all(log.count("fetching") == 1 for log in logs), "the second start moves nothing"
    assert not network.pids(), "a process is left"
