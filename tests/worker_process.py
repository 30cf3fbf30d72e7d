"""A real ``flowspec worker`` for tests, as on another machine: a process of its own, on a port that it chose itself."""

from __future__ import annotations

import os
import re
import signal
from functools import cached_property
from pathlib import Path

import psutil

from flowspec.wire.key_file import STATE_VARIABLE
from logged_process import LoggedProcess


class WorkerProcess:
    """Started at once; whoever asks for its address waits until it listens."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *arguments: str, state: Path | None = None) -> None:
        """``state``: the folder of its keys."""
        command = ["worker", "--threads", "1", "--listen", f"{host}:{port}", *arguments]
        environment = os.environ if state is None else {**os.environ, STATE_VARIABLE: str(state)}
        self._running = LoggedProcess(command, "listening on", env=environment)

    @property
    def log(self) -> str:
        return self._running.log

    @cached_property
    def address(self) -> str:
        self._running.comes_up(120)
        found = re.search(r"listening on tcp://(\S+:\d+)", self._running.log)
        assert found is not None, f"the worker did not come up: {self._running.log}"
        return found[1]

    @property
    def is_alive(self) -> bool:
        return self._running.process.poll() is None

    def kill(self) -> None:
        """As when its power is cut."""
        self._running.process.kill()
        self._running.wait(20)

    def stop(self) -> None:
        """It stands still."""
        self._running.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._running.process.send_signal(signal.SIGCONT)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._running.process.pid)

    def end(self) -> str:
        """What it has said."""
        self._running.process.send_signal(signal.SIGTERM)
        self._running.wait(20)
        assert "Traceback" not in self._running.log, self._running.log
        return self._running.log
