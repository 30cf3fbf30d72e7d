"""What driver and workers are to the shells that pump them: actors that hold no socket, no clock and no thread."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from flowspec.wire.messages import Message


class Route(Enum):
    """Where an actor's message goes."""

    NEXT = "next"  # along the data path, to the next worker
    WORKERS = "workers"  # from the driver to every worker, on the control connections
    DRIVER = "driver"  # from a worker to the driver


@dataclass(frozen=True)
class Send:
    """What an actor wants done: it holds no socket."""

    route: Route
    message: Message


class Actor(Protocol):
    """The driver, a worker, or what plays one."""

    @property
    def wake_s(self) -> float:
        """When it may have work again even if no message comes; on its own clock, infinite for never."""
        ...

    def on_message(self, message: Message) -> list[Send]:
        """Take a message, without working on it for long."""
        ...

    def on_idle(self) -> list[Send] | None:
        """Do one piece of the work that waits; ``None``: there is none."""
        ...
