"""Worker processes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from flowspec.errors import WorkerError

_END_TIMEOUT_S = 5.0


class LocalProcesses:
    """A ``Launcher`` of worker processes on this machine. Ended by ``close``, and by themselves when this process dies.

    One child imports what workers need and forks them, so that this is paid once and not for every worker.
    """

    def __init__(self, num_workers: int, threads: int, device: str, module: str = "flowspec.worker.local") -> None:
        """``module``: that forks them; see there."""
        self._directory = Path(tempfile.mkdtemp(prefix="flowspec-"))
        self.addresses = [f"ipc://{self._directory / str(i)}" for i in range(1, num_workers + 1)]
        command = [sys.executable, "-m", module, str(threads), device, *self.addresses]
        try:
            self._forker = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the workers end when it closes
                stdout=subprocess.PIPE,  # one line for each worker that has ended
                start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers
            )
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        assert self._forker.stdout is not None
        os.set_blocking(self._forker.stdout.fileno(), False)

    def check(self) -> None:
        """Raises ``WorkerError`` when a worker has ended."""
        assert self._forker.stdout is not None
        if news := self._forker.stdout.readline():
            index, code = map(int, news.split())
            raise WorkerError(f"worker {index} ended unexpectedly ({_describe_exit(code)})")
        if self._forker.poll() is not None:
            raise WorkerError(f"the workers ended unexpectedly ({_describe_exit(self._forker.returncode)})")

    def close(self) -> None:
        """Returns when all workers have ended."""
        assert self._forker.stdin is not None and self._forker.stdout is not None
        self._forker.stdin.close()
        try:
            self._forker.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._forker.pid, signal.SIGKILL)  # it leads the session that all workers are in
            self._forker.wait()
        self._forker.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def num_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_threads(num_workers: int) -> int:
    """Torch threads for each of so many workers on this machine, the driver counted as one more."""
    return max(1, num_cores() // (num_workers + 1))
