"""Threads that help with the work of a stage, and are away between forwards.

A helper sleeps until it is called, then waits for units in the mailbox without Python's lock, and leaves after about a
millisecond without any. Work neither waits for a helper to come nor needs one. A mailbox may be used from any thread:
whoever finds it taken works alone.
"""

from __future__ import annotations

import atexit
from functools import cache
from threading import Semaphore, Thread
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowspec.model import mailbox_kernel, team_kernel
from flowspec.model.compiled import callback
from flowspec.model.mailbox_kernel import (
    CALLED,
    HELPERS,
    IS_SHARED,
    LEAVE,
    NUM_WORDS,
    SPIN_NS,
    SPINS,
    UNIT_NS,
    WANTED,
    spin,
)
from flowspec.model.team_kernel import call_helpers, serve

# What is worth to be handed over; that takes well below a microsecond.
_UNIT_NS = 10_000

Mailbox = NDArray[np.int64]

_WORK = {
    mailbox_kernel.TAKE: team_kernel.take_rows,
    mailbox_kernel.GATE: team_kernel.gate_rows,
    mailbox_kernel.ADD: team_kernel.add_rows,
    mailbox_kernel.TURN: team_kernel.turn_rows,
    mailbox_kernel.WRITE: team_kernel.write_rows,
    mailbox_kernel.ATTEND: team_kernel.attend_rows,
}


class Team:
    """So many threads, of which the caller is one."""

    def __init__(self, num_threads: int, unit_ns: int = _UNIT_NS) -> None:
        """``unit_ns``: what a part of the work takes at least, roughly, to be shared out. Call ``close`` in the end."""
        self._box: Mailbox = np.zeros(NUM_WORDS, np.int64)
        self._box[IS_SHARED] = 1
        for place, work in _WORK.items():
            self._box[place] = callback(work).address
        self._called = Semaphore(0)
        self._helpers: list[Thread] = []
        if num_threads > 1:
            self._box[HELPERS], self._box[UNIT_NS], self._box[CALLED] = num_threads - 1, unit_ns, 1
            self._box[SPINS] = _looks_in(SPIN_NS)
            serve(self._box)  # so that it is compiled
            call: Any = self._help
            self._helpers = [Thread(target=call, name=f"kernel-{i}", daemon=True) for i in range(num_threads - 1)]
            for helper in self._helpers:
                helper.start()

    @property
    def mailbox(self) -> Mailbox:
        """For one call of a kernel. Helpers come if the last ones had work for them."""
        if self._helpers and self._box.item(WANTED):
            for _ in range(call_helpers(self._box)):
                self._called.release()
        return self._box

    @property
    def num_called(self) -> int:
        """Helpers that are there, or on their way."""
        return int(self._box[CALLED]) if self._helpers else 0

    def close(self) -> None:
        """No work of the team may be under way. It may be done again."""
        if self._helpers:
            self._box[LEAVE] = 1
            self._called.release(len(self._helpers))
            for helper in self._helpers:
                helper.join()
            self._helpers = []
            self._box[HELPERS] = 0

    def _help(self) -> None:
        box = self._box
        while self._called.acquire() and not box[LEAVE]:
            serve(box)


def _looks_in(duration_ns: int) -> int:
    """How often a thread looks at a word in that time."""
    num_looks, times = 1000, []
    spin(num_looks)
    for _ in range(5):
        begin = perf_counter()
        spin(num_looks)
        times.append(perf_counter() - begin)
    return max(1000, int(num_looks * duration_ns * 1e-9 / min(times)))


@cache
def team_of(num_threads: int) -> Team:
    """This process's own."""
    team = Team(num_threads)
    atexit.register(team.close)
    return team
