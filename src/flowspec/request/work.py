"""The driver's own work, by kind, and who is told of it. Nothing that does any."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Protocol


class Work(StrEnum):
    """The driver's own work, by kind."""

    DRAFT_PASS = "draft pass"
    MERGE_PASS = "merging draft pass"  # the first pass over a tree that a commit has kept
    GROW = "growing"  # children from what a block draft has guessed already
    HINT = "hint"
    LM_HEAD = "lm_head"
    VERIFY = "verify"
    SEND = "send"


class OnWork(Protocol):
    """Told of each piece of work when it is done: to measure a real run, or to charge for it in a simulated one."""

    def __call__(self, kind: Work, num_rows: int, start_s: float, end_s: float) -> None: ...


class Working:
    """A context: what is done inside it is told of at its end, unless that raises."""

    __slots__ = ("_clock", "_kind", "_num_rows", "_on_work", "_start_s")

    def __init__(self, kind: Work, num_rows: int, on_work: OnWork, clock: Callable[[], float]) -> None:
        self._kind, self._num_rows = kind, num_rows
        self._on_work, self._clock = on_work, clock

    def __enter__(self) -> None:
        self._start_s = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._on_work(self._kind, self._num_rows, self._start_s, self._clock())


def unwatched(kind: Work, num_rows: int, start_s: float, end_s: float) -> None:
    """Nobody wants to know."""
