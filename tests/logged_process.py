"""A ``flowspec`` command in a process of its own, whose log is read while it runs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any


class LoggedProcess:
    """Started at once. ``sign``: what its log says when it is up. ``before``: a command that runs it."""

    def __init__(self, arguments: list[str], sign: str, before: Sequence[str] = (), **options: Any) -> None:
        command = [*before, sys.executable, "-m", "flowspec", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
        self.log = ""
        self._sign = sign
        self._has_news = threading.Event()  # it is up, or has ended
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if self._sign in self.log:
                self._has_news.set()
        self._has_news.set()

    def comes_up(self, timeout_s: float) -> bool:
        """Waits for it."""
        return self._has_news.wait(timeout_s) and self._sign in self.log and self.process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Its exit code; all of its log is there by then."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout=10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code
