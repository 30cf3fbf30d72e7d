"""The workers of one machine: forked by one process that has imported the libraries once.

``python -m flowspec.worker.local THREADS DEVICE ADDRESS...``; ``cluster.local`` starts it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from flowspec.config import LinkConfig
from flowspec.worker.process import Emulate, serve


def _end_when_input_closes() -> None:
    """End this process when standard input closes: the driver holds the other end, and loses it even when killed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="watch-driver", daemon=True).start()


def fork_workers(threads: int, device: str, addresses: list[str], emulate: Emulate | None = None) -> None:
    """Fork one worker for each address and print ``index exit_code`` for each that ends, until none is left."""
    indices: dict[int, int] = {}
    for index, address in enumerate(addresses, start=1):
        pid = os.fork()
        if pid == 0:
            _end_when_input_closes()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            heartbeat_s = LinkConfig().heartbeat_s
            serve(address, heartbeat_s=heartbeat_s, threads=threads, device=device, emulate=emulate)
            os._exit(0)
        indices[pid] = index
    while indices:
        pid, status = os.wait()
        # In one write: the reader does not wait for the rest of a line.
        os.write(1, f"{indices.pop(pid)} {os.waitstatus_to_exitcode(status)}\n".encode())


def main(emulate: Emulate | None = None) -> None:
    """By the arguments of the command."""
    logging.basicConfig(level=logging.ERROR, format="flowspec worker: %(message)s")
    logging.getLogger("flowspec.hub").setLevel(logging.INFO)  # downloads are long, and seldom
    fork_workers(int(sys.argv[1]), sys.argv[2], sys.argv[3:], emulate)


if __name__ == "__main__":
    main()
