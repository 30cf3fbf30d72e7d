"""A real ``flowspec worker`` for tests, as on another machine: a process of its own, on a port that it chose itself."""

from __future__ import annotations

import re
import signal
from functools import cached_property

import psutil

from logged_process import LoggedProcess


class WorkerProcess:
    """Started at once; whoever asks for its address waits until it listens."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._running = LoggedProcess(["worker", "--threads", "1", "--listen", f"{host}:0"], "listening on")

    @cached_property
    def address(self) -> str:
        self._running.comes_up(120)
        found = re.search(r"listening on tcp://(\S+:\d+)", self._running.log)
        assert found is not None, f"the worker did not come up: {self._running.log}"
        return found[1]

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._running.process.pid)

    @property
    def log(self) -> str:
        return self._running.log

    def end(self) -> str:
        """What it has said."""
        self._running.process.send_signal(signal.SIGTERM)
        self._running.wait(20)
        assert "Traceback" not in self._running.log, self._running.log
        return self._running.log
