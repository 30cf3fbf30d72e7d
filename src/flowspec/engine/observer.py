"""Who watches an engine: metrics, the dashboard, tests."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flowspec.engine.job import Job
from flowspec.request.work import Work
from flowspec.wire.messages import Result

logger = logging.getLogger("flowspec.engine")


class Observer:
    """Told of what happens, on the engine's thread; this one takes no notice. One that raises is told no more."""

    def on_work(self, kind: Work, num_rows: int, start_s: float, end_s: float) -> None:
        """The driver has done a piece of its own work, between these times on its clock."""

    def on_result(self, job: Job, result: Result) -> None:
        """A segment has come back; the driver has not read it yet."""

    def on_tokens(self, job: Job, num_new: int, interval_s: float | None) -> None:
        """Tokens have come out. ``interval_s``: since those before; ``None`` for the first ones."""

    def on_end(self, job: Job) -> None:
        """It has its ``ending``; told once of every job."""


class Observers:
    """All who watch one engine."""

    def __init__(self) -> None:
        self._all: list[Observer] = []

    def add(self, observer: Observer) -> None:
        self._all.append(observer)

    def tell(self, of: Callable[[Observer], None]) -> None:
        for observer in list(self._all):
            try:
                of(observer)
            except Exception:
                logger.exception("%s met a bug, and is told no more", type(observer).__name__)
                self._all.remove(observer)

    def on_work(self, kind: Work, num_rows: int, start_s: float, end_s: float) -> None:
        """As the driver tells of it."""
        if self._all:
            self.tell(lambda observer: observer.on_work(kind, num_rows, start_s, end_s))
