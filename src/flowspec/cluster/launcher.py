"""Who has the workers' processes of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flowspec.wire.curve import Security


class Launcher(Protocol):
    """It has started them here, or knows where they run."""

    @property
    def addresses(self) -> Sequence[str]:
        """Of the workers, in pipeline order."""
        ...

    @property
    def security(self) -> Security | None:
        """What proves both ends of connections to them; ``None`` on this machine, or where the user wants none."""
        ...

    def check(self) -> None:
        """Raises ``WorkerError`` when a worker is known to have ended."""

    def age_s(self, stage: int) -> float | None:
        """For how long its process has been running; ``None`` where nobody knows."""

    def replace(self, stages: Sequence[int]) -> None:
        """These workers answer no more: start others in their places, where they are this launcher's own."""

    def close(self) -> None:
        """End what was started for this driver alone; returns when it has ended."""


@dataclass(frozen=True)
class RunningWorkers:
    """A ``Launcher`` for workers that somebody else has started, and that wait for a driver again afterwards."""

    addresses: Sequence[str]
    security: Security | None = None

    def check(self) -> None:
        """Their connections tell."""

    def age_s(self, stage: int) -> float | None:
        """Nobody knows."""
        return None

    def replace(self, stages: Sequence[int]) -> None:
        """That is for those who have started them; connections find whoever listens there."""

    def close(self) -> None:
        """They go on."""
