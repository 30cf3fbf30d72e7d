"""All workers in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from flowspec.cluster.connections import LoadProgress
from flowspec.cluster.tap_blocks import Blocks
from flowspec.cluster.trips import Trip
from flowspec.core import DType, Partition, TapShape, Weights
from flowspec.model.backends import load_stage, stage_taps
from flowspec.model.hint_head import load_hinter
from flowspec.model.loader import Checkpoint
from flowspec.wire.actor import Send
from flowspec.wire.messages import Ready, ToDriver
from flowspec.wire.transport import DRIVER, InprocNetwork
from flowspec.worker.actor import Worker
from flowspec.worker.checks import Limits


class InprocConnections:
    """The driver's side of workers without parallelism and sockets; for tests and for debugging."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        partition: Partition,
        dtype: DType,
        device: str,
        hints: str | None = None,
        weights: Weights = "float",
        taps: TapShape | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        """``taps`` and ``blocks``: as ``RemoteConnections.configure`` takes them."""
        self.workers: list[Worker] = []
        for index, layers in enumerate(partition.stages, start=1):
            hinter = None if hints is None else load_hinter(hints, checkpoint, layers.end, dtype, device)
            stage = load_stage(checkpoint, layers, dtype, weights, device)
            own = None
            if taps is not None and blocks is not None:
                own = stage_taps(taps, layers, stage.is_last, blocks, dtype, weights, device)
            limits = Limits.of(checkpoint)
            self.workers.append(
                Worker(stage, index, time.perf_counter, hinter=hinter, layers=str(layers), limits=limits, taps=own)
            )
        self._network = InprocNetwork(len(partition))

    @property
    def link_bytes(self) -> int:
        return self._network.num_bytes

    @property
    def trips(self) -> Mapping[int, Trip]:
        return dict.fromkeys(range(1, len(self.workers) + 1), Trip(0.0, 0.0))

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        """They were loaded when they were made, and nobody has measured them."""
        return []

    def probe(self) -> None:
        """There is no way to measure."""

    def send(self, sends: Iterable[Send]) -> None:
        self._network.post(DRIVER, sends)

    def receive(self, timeout_s: float) -> list[ToDriver]:
        """Deliver what is waiting and let every worker do one piece of work; never waits."""
        received: list[Any] = []
        for link in self._network.waiting():
            message = self._network.take(link)
            if link.target == DRIVER:
                received.append(message)
            else:
                self._network.post(link.target, self.workers[link.target - 1].on_message(message))
        for index, worker in enumerate(self.workers, start=1):
            self._network.post(index, worker.on_idle() or [])
        return received

    def wake(self) -> None:
        """It never waits."""

    def close(self) -> None:
        for worker in self.workers:
            worker.check_integrity()
