"""The workers of one machine: forked by one process that has imported the libraries once, and again when one ends.

``python -m flowspec.worker.local THREADS DEVICE ADDRESS...``; ``cluster.local`` starts it, and ends it by closing its
standard input. It prints a line for each worker that has started (``started INDEX PID``) or ended
(``ended INDEX EXIT_CODE``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time

from flowspec.config import LinkConfig
from flowspec.worker.serve import serve
from flowspec.worker.session import Emulate

_YOUNG_S = 2.0  # one that ends sooner would only end again
_YOUNG_WAIT_S = 0.5  # before its successor


class _Forker:
    """Keeps one worker on each address. Single-threaded, since it forks."""

    def __init__(self, threads: int, device: str, addresses: list[str], emulate: Emulate | None) -> None:
        self._threads = threads
        self._device = device
        self._addresses = addresses
        self._emulate = emulate
        self._running: dict[int, tuple[int, float]] = {}  # by process id: the worker's index, and when it started
        self._due_s = dict.fromkeys(range(1, len(addresses) + 1), 0.0)  # when the missing ones start, by index
        self._child_ended, self._signal_end = os.pipe()
        for descriptor in (self._child_ended, self._signal_end):
            os.set_blocking(descriptor, False)

    def run(self) -> None:
        """Until standard input closes; none of the workers is left then."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signal_end)
        while True:
            self._start_due()
            wait_s = max(0.0, min(self._due_s.values()) - time.monotonic()) if self._due_s else None
            readable, _, _ = select.select([0, self._child_ended], [], [], wait_s)
            if 0 in readable and not os.read(0, 4096):
                break
            with contextlib.suppress(BlockingIOError):
                os.read(self._child_ended, 4096)
            self._reap()
        for pid in self._running:  # one that is stopped would not notice that its driver is gone
            os.kill(pid, signal.SIGKILL)
        for pid in self._running:
            os.waitpid(pid, 0)

    def _start_due(self) -> None:
        now = time.monotonic()
        for index in [index for index, due_s in self._due_s.items() if due_s <= now]:
            del self._due_s[index]
            pid = os.fork()
            if pid == 0:
                self._become_worker(self._addresses[index - 1])
            self._running[pid] = index, now
            _tell(f"started {index} {pid}")

    def _become_worker(self, address: str) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._child_ended)
        os.close(self._signal_end)
        _end_when_input_closes()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        heartbeat_s = LinkConfig().heartbeat_s
        serve(address, heartbeat_s=heartbeat_s, threads=self._threads, device=self._device, emulate=self._emulate)
        os._exit(0)

    def _reap(self) -> None:
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            index, start_s = self._running.pop(pid)
            now = time.monotonic()
            self._due_s[index] = now + (_YOUNG_WAIT_S if now - start_s < _YOUNG_S else 0.0)
            _tell(f"ended {index} {os.waitstatus_to_exitcode(status)}")


def _tell(line: str) -> None:
    """In one write: the reader does not wait for the rest of a line."""
    with contextlib.suppress(BrokenPipeError):  # the driver is gone: standard input says so too
        os.write(1, f"{line}\n".encode())


def _end_when_input_closes() -> None:
    """End this process when standard input closes: the driver holds the other end, and loses it even when killed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="watch-driver", daemon=True).start()


def main(emulate: Emulate | None = None) -> None:
    """By the arguments of the command."""
    logging.basicConfig(level=logging.ERROR, format="flowspec worker: %(message)s")
    logging.getLogger("flowspec.hub").setLevel(logging.INFO)  # downloads are long, and seldom
    _Forker(int(sys.argv[1]), sys.argv[2], sys.argv[3:], emulate).run()
    os._exit(0)  # the driver waits: the libraries would take long to be taken down


if __name__ == "__main__":
    main()
