"""A real ``flowspec worker`` for tests, as on another machine: a process of its own, on a port that it chose itself."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from functools import cached_property


class WorkerProcess:
    """Started at once; whoever asks for its address waits until it listens."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        command = [sys.executable, "-m", "flowspec", "worker", "--threads", "1", "--listen", f"{host}:0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._log: list[str] = []
        self._is_up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)
            if "listening on" in line:
                self._is_up.set()

    @cached_property
    def address(self) -> str:
        self._is_up.wait(timeout=120)
        found = re.search(r"listening on tcp://(\S+:\d+)", "".join(self._log))
        assert found is not None, f"the worker did not come up: {self._log}"
        return found[1]

    def end(self) -> str:
        """What it has said."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=20)
        self._reader.join(timeout=10)
        assert self._process.stderr is not None
        self._process.stderr.close()
        text = "".join(self._log)
        assert "Traceback" not in text, text
        return text
