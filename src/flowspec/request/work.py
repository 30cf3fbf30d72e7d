"""The driver's own work, by kind, and who is told of it. Nothing that does any."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Work(str, Enum):
    """The driver's own work, by kind."""

    DRAFT_PASS = "draft pass"
    MERGE_PASS = "merging draft pass"  # the first pass over a tree that a commit has kept
    HINT = "hint"
    LM_HEAD = "lm_head"
    VERIFY = "verify"
    SEND = "send"


class OnWork(Protocol):
    """Told of each piece of work when it is done: to measure a real run, or to charge for it in a simulated one."""

    def __call__(self, kind: Work, num_rows: int, start_s: float, end_s: float) -> None: ...


def unwatched(kind: Work, num_rows: int, start_s: float, end_s: float) -> None:
    """Nobody wants to know."""
