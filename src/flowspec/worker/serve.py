"""A worker on one address, until it is told to end: ``flowspec worker``, and what ``worker.local`` forks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flowspec.model.loader import check_device
from flowspec.worker.door import Keys
from flowspec.worker.ending import note_orders
from flowspec.worker.memory import Allowance
from flowspec.worker.process import WorkerProcess
from flowspec.worker.session import Emulate
from flowspec.worker.sources import Sources


def serve(
    address: str,
    *,
    heartbeat_s: float,
    threads: int,
    device: str,
    announce: Callable[[str], None] | None = None,
    emulate: Emulate | None = None,
    keys: Keys | None = None,
    sources: Sources | None = None,
    memory: Allowance | None = None,
) -> None:
    """Until it is interrupted. ``announce`` is called with the endpoint once it listens. Raises ``UsageError``.

    ``memory``: of the device, that it may use; by default what is free.
    """
    check_device(device)
    if threads:
        torch.set_num_threads(threads)
    process = WorkerProcess(address, heartbeat_s, device, emulate, keys, sources, memory)
    try:
        is_over = note_orders()  # whoever reads where it listens may end it at once
        if announce is not None:
            announce(process.endpoint)
        process.run(is_over)
    finally:
        process.close()
