"""What several of these tests have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from worker_process import WorkerProcess


@pytest.fixture
def remote_workers() -> Iterator[list[str]]:
    """The addresses of two, each a process."""
    workers = [WorkerProcess() for _ in range(2)]
    yield [worker.address for worker in workers]
    for worker in workers:
        worker.end()
