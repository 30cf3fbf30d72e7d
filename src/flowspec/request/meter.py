"""The driver's own work, by kind, and who is told of it. Nothing that does any."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


class Meter(Protocol):
    """Told of the driver's work as it is done: to measure it in a real run, or to charge for it in a simulated one."""

    def work(self, kind: Work, num_rows: int) -> AbstractContextManager[None]: ...


class NoMeter:
    def work(self, kind: Work, num_rows: int) -> AbstractContextManager[None]:
        return nullcontext()
