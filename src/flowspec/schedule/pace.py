"""When the pipeline is free for another segment, as far as the driver can know: the late binding of ``flow``.

Segments follow each other at the pace of the slowest stage. The driver knows what a forward costs there, when it sent
what, and from the results how long a hop takes; from these it follows when worker 1 should get the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flowspec.core import interpolate
from flowspec.tree import Floats
from flowspec.wire.messages import Ready, Result, Timing

MAX_SEGMENT_LEN = 128
DEFAULT_SEGMENT_LEN = 16  # where nothing is known of the devices, as published

_CORRECTION_SHARE = 0.1  # of a forward's surprise that the next ones are expected to repeat
_DELAY_WEIGHT = 2  # of the time that a row costs the others, against what it saves: it may go with the next segment
_DEAR_ROWS = 6  # trees are as published where so many rows double the time of a segment's way,
_SLOT_SHARE = 0.5  # or where that time is no more than this share of a slot
_ROW_COUNTS = 2 ** np.arange(11)  # between which the time of a way is linear


class Costs(Protocol):
    """What a segment of so many rows costs, in seconds."""

    def stage_s(self, num_rows: int) -> float:
        """A forward on the slowest stage."""
        ...

    def wire_s(self, num_rows: int) -> float:
        """The transfer over the slowest link between workers."""
        ...

    def way_s(self, num_rows: int) -> float:
        """All forwards and transfers, one after the other."""
        ...


class MeasuredCosts:
    """As the workers have measured them at start-up, and corrected by what their forwards take since."""

    def __init__(self, ready: Sequence[Ready], row_bytes: float) -> None:
        """``row_bytes``: of one row's hidden states."""
        self._tables = [r.forward_s for r in ready]
        self._s_per_row = row_bytes / min((r.link_bytes_per_s for r in ready if r.link_bytes_per_s), default=math.inf)
        self._factors = [1.0] * len(ready)  # by which forwards take longer than at start-up

    def stage_s(self, num_rows: int) -> float:
        stages = zip(self._tables, self._factors, strict=True)
        return max(interpolate(table, num_rows) * factor for table, factor in stages)

    def wire_s(self, num_rows: int) -> float:
        return num_rows * self._s_per_row

    def way_s(self, num_rows: int) -> float:
        stages = zip(self._tables, self._factors, strict=True)
        return sum(interpolate(table, num_rows) * factor + self.wire_s(num_rows) for table, factor in stages)

    def note(self, timings: Sequence[Timing]) -> None:
        """A segment's forwards: the text grows, devices get warm, and other programs want them too.

        None is faster than the fastest at start-up, but one on an accelerator may seem so: nobody has waited for it.
        """
        for timing in timings:
            if timing.num_rows:
                measured_s = interpolate(self._tables[timing.stage - 1], timing.num_shared)
                factor = max(1.0, (timing.end_s - timing.start_s) / measured_s)
                self._factors[timing.stage - 1] += _CORRECTION_SHARE * (factor - self._factors[timing.stage - 1])


def free_rows(costs: Costs) -> int:
    """The most rows that cost hardly more than one: 10 % of a forward, and 35 % of its time on the wire.

    Where few are free, as on processors, rows may cost what they bring: the tokens that the best n nodes of a tree
    bring grow about like log2(n + 1). Up to ``DEFAULT_SEGMENT_LEN`` rows, the most tokens for their time.
    """
    one_s = costs.stage_s(1)
    free = (
        n for n in range(1, MAX_SEGMENT_LEN + 1) if costs.stage_s(n) <= 1.1 * one_s and costs.wire_s(n) <= 0.35 * one_s
    )
    worth = max(range(1, DEFAULT_SEGMENT_LEN + 1), key=lambda n: math.log2(n + 1) / slot_s(costs, n))
    return max([worth, *free])


def slot_s(costs: Costs, num_rows: int) -> float:
    """How long a segment keeps the slowest stage or link busy."""
    return max(costs.stage_s(num_rows), costs.wire_s(num_rows))


class FixedPace:
    """Where nothing is known of the devices beforehand: segments as published, sent whenever there is room for one."""

    segment_len = DEFAULT_SEGMENT_LEN
    tree_times = 1.0
    due_s = -math.inf

    def __init__(self) -> None:
        self.slot_s = 0.0  # how long a segment keeps the slowest stage busy, as results tell; 0: none has come

    def num_worth(self, scores: Floats) -> int:
        """All: nobody knows what they cost."""
        return len(scores)

    def note_sent(self, num_rows: int, now: float) -> None:
        """It makes no difference."""

    def note_miss(self, now: float) -> None:
        """It makes no difference."""

    def note_result(self, result: Result, sent_s: float | None, now: float) -> None:
        """Only the time of its forwards does."""
        slowest_s = max((timing.end_s - timing.start_s for timing in result.timings), default=0.0)
        if slowest_s and sent_s is not None:
            self.slot_s += (slowest_s - self.slot_s) * (_CORRECTION_SHARE if self.slot_s else 1.0)


class Pace:
    """The pace of one pipeline, for all its requests. All times are on the driver's clock, in seconds."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.measure()
        self._hop_s = 0.0  # the shortest that was seen
        self._num_hops = 0
        self._knows_hop = False
        self._start_s = 0.0  # when the last segment sent meets worker 1 free
        self._free_s = 0.0  # when the pipeline can take the next one

    def measure(self) -> None:
        """Size segments by what they cost now."""
        self.segment_len = free_rows(self._costs)
        self.slot_s = slot_s(self._costs, self.segment_len)  # of a full segment
        self._ways_s = np.array([self._costs.way_s(num_rows) for num_rows in _ROW_COUNTS.tolist()])
        one_s, more_s = np.interp((1, DEFAULT_SEGMENT_LEN), _ROW_COUNTS, self._ways_s)
        rows_s = _DEAR_ROWS * (more_s - one_s) / (DEFAULT_SEGMENT_LEN - 1)
        # How many times less probable than published a node may be. One that comes true saves a way; if not, it has
        # delayed the rows that it went with, and kept the slowest stage or link from others.
        self.tree_times = max(1.0, float(one_s / max(rows_s, _SLOT_SHARE * self.slot_s)))

    def num_worth(self, scores: Floats) -> int:
        """How many of the rows with these scores, which fall, one segment should take along.

        A row that comes true saves a way through the pipeline; coming true or not, it delays the others. So the more
        it delays them, the more probable it has to be as a share of the best one's probability.
        """
        ways_s = np.interp(np.arange(1, len(scores) + 1), _ROW_COUNTS, self._ways_s)
        saved_s = np.cumsum(np.exp(scores - scores[0])) * (ways_s[0] + self._num_hops * self._hop_s)
        return 1 + int(np.argmax(saved_s - _DELAY_WEIGHT * ways_s))

    @property
    def due_s(self) -> float:
        """When to send the next segment."""
        return self._free_s - self._hop_s

    def note_sent(self, num_rows: int, now: float) -> None:
        """A segment is about to be sent."""
        self._start_s = max(self._free_s, now + self._hop_s)
        self._free_s = self._start_s + slot_s(self._costs, num_rows)

    def note_miss(self, now: float) -> None:
        """All that is under way is dead, and ends where the commit meets it."""
        self._free_s = min(self._free_s, now + self._hop_s)

    def note_result(self, result: Result, sent_s: float | None, now: float) -> None:
        """A result's way, less the forwards in it, is its hops and its waiting; the shortest had least waiting."""
        if sent_s is None:
            return
        computing_s = sum(timing.end_s - timing.start_s for timing in result.timings)
        self._num_hops = len(result.timings) + 1
        hop_s = (now - sent_s - computing_s) / self._num_hops
        self._hop_s = min(self._hop_s, hop_s) if self._knows_hop else hop_s
        self._knows_hop = True
