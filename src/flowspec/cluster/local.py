"""Worker processes on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from flowspec.cluster.socket_folder import SocketFolder
from flowspec.errors import WorkerEndedError, WorkerError

logger = logging.getLogger("flowspec.cluster")

_END_TIMEOUT_S = 5.0
_POLL_S = 0.01


class LocalProcesses:
    """A ``Launcher`` of worker processes on this machine. Ended by ``close``, and by themselves when this process dies.

    One child imports what workers need and forks them, so that this is paid once and not for every worker. When one
    ends, that child forks its successor at once, on the same address.
    """

    security = None  # nobody else can open their sockets

    def __init__(self, num_workers: int, threads: int, device: str, module: str = "flowspec.worker.local") -> None:
        """``module``: that forks them; see there."""
        self._folder = SocketFolder()
        self.addresses = [f"ipc://{self._folder.path / str(i)}" for i in range(1, num_workers + 1)]
        self._command = [sys.executable, "-m", module, str(threads), device, *self.addresses]
        self._pids: dict[int, int] = {}  # by stage; of those that are known to have started, and not to have ended
        self._start_s: dict[int, float] = {}  # when they were seen to have started
        try:
            self._forker = self._start()
        except BaseException:
            self._folder.close()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        forker = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,  # the workers end when it closes
            stdout=subprocess.PIPE,  # one line for each worker that has started or ended
            start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers
        )
        assert forker.stdout is not None
        os.set_blocking(forker.stdout.fileno(), False)
        return forker

    def check(self) -> None:
        """Raises ``WorkerEndedError`` when a worker has ended since the last call, ``WorkerError`` when all have."""
        if ended := self._read():
            told = ", ".join(f"worker {stage} ended unexpectedly ({_describe_exit(ended[stage])})" for stage in ended)
            raise WorkerEndedError(told, list(ended))
        if (code := self._forker.poll()) is not None:
            raise WorkerError(f"the workers ended unexpectedly ({_describe_exit(code)})")

    def _read(self) -> dict[int, int]:
        """What has become of the workers; returns the exit codes of those that have ended, by stage."""
        assert self._forker.stdout is not None
        ended: dict[int, int] = {}
        while line := self._forker.stdout.readline():
            what, stage, number = line.split()
            if what == b"started":
                self._pids[int(stage)], self._start_s[int(stage)] = int(number), time.monotonic()
            else:
                self._pids.pop(int(stage), None)
                ended[int(stage)] = int(number)
        return ended

    @property
    def pids(self) -> dict[int, int]:
        """Of the worker processes that run now, by stage."""
        return dict(self._pids)

    def age_s(self, stage: int) -> float | None:
        """For how long its process has been running; ``None`` while none does."""
        return time.monotonic() - self._start_s[stage] if stage in self._pids else None

    def replace(self, stages: Sequence[int]) -> None:
        """End these workers, whatever they do, so that others take their places; forget who has ended before."""
        self._tell(self._read())
        if self._forker.poll() is not None:
            self._start_again()
            return
        victims = {stage: self._pids[stage] for stage in stages if stage in self._pids}
        for pid in victims.values():
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and nobody has read that yet
                os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while any(self._pids.get(stage) == pid for stage, pid in victims.items()):
            if time.monotonic() > deadline_s:  # whoever forks them stands still, too
                self._start_again()
                return
            time.sleep(_POLL_S)
            self._tell(self._read())

    def _tell(self, ended: dict[int, int]) -> None:
        for stage, code in ended.items():
            logger.warning("worker %d ended (%s)", stage, _describe_exit(code))

    def _start_again(self) -> None:
        """All workers, and who forks them."""
        self._end_forker()
        self._pids.clear()
        self._forker = self._start()

    def close(self) -> None:
        """Returns when all workers have ended."""
        self._end_forker()
        self._folder.close()

    def _end_forker(self) -> None:
        assert self._forker.stdin is not None and self._forker.stdout is not None
        self._forker.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._forker.wait(timeout=_END_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self._forker.pid, signal.SIGKILL)  # it leads the session that all workers are in
        self._forker.wait()
        self._forker.stdout.close()


def _describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def num_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_threads(num_workers: int) -> int:
    """Torch threads for each of so many workers on this machine, the driver counted as one more."""
    return max(1, num_cores() // (num_workers + 1))
