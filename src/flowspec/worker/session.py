"""One driver's use of a worker, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from flowspec.errors import WorkerError
from flowspec.model.stage import Stage
from flowspec.model.taps import Taps
from flowspec.wire.actor import Actor
from flowspec.wire.messages import Configure, Emulation, Ready
from flowspec.wire.transport import Connection, identity_of
from flowspec.worker.fetch import StageFetch
from flowspec.worker.hints import Hinter
from flowspec.worker.kept import Loaded
from flowspec.worker.measure import LinkMeter
from flowspec.worker.taps import TapBlocks


class WorkerActor(Actor, Protocol):
    """``worker.actor.Worker``, or what plays one; its clock is the monotonic one."""

    link_bytes: int  # received on the data path: this shell counts


# A stage, its index, and what device to play -> the actor that does.
Emulate = Callable[[Stage, int, Emulation, Hinter | None, Taps | None], WorkerActor]


class LinkLostError(WorkerError):
    """The next worker is gone."""


class SessionOver(Exception):  # noqa: N818 - not an error
    """The driver is gone or has said goodbye: free everything and wait for the next one."""


@dataclass
class Session:
    """One driver's use of this worker."""

    name: str
    driver: bytes  # identity of its control connection
    stage: int
    heartbeat_s: float
    link: Connection | None = None  # to the next worker
    meter: LinkMeter | None = None  # of the link; ``None``: there is nothing to measure
    worker: WorkerActor | None = None  # once the stage is loaded
    start_s: float = field(default_factory=time.monotonic)
    configure: Configure | None = None  # what was asked for
    fetch: StageFetch | None = None  # of what this device has not, while that comes
    num_fetched: int = 0  # bytes that have come
    loaded: Loaded | None = None
    blocks: TapBlocks | None = None  # of a draft that reads several layers; it comes when the stage is loaded
    ready: Ready | None = None  # what the driver will be told when the next worker is reached, and the link measured

    def owns(self, identity: bytes) -> bool:
        """Whether a connection is its driver's, or that of the worker before."""
        return identity in (self.driver, identity_of(self.name, "data"))
