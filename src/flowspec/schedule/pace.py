"""When the pipeline is free for another segment, as far as the driver can know: the late binding of ``flow``.

Segments follow each other at the pace of the slowest stage. The driver knows what a forward costs there, when it sent
what, and from the results how long a hop takes; from these it follows when worker 1 should get the next one.
"""

from __future__ import annotations

from typing import Protocol

from flowspec.messages import Result

MAX_SEGMENT_LEN = 128


class Costs(Protocol):
    """What a segment of so many rows costs, in seconds."""

    def stage_s(self, num_rows: int) -> float:
        """A forward on the slowest stage."""
        ...

    def wire_s(self, num_rows: int) -> float:
        """The transfer over the slowest link between workers."""
        ...


def free_rows(costs: Costs) -> int:
    """The most rows that cost hardly more than one: 10 % of a forward, and 35 % of its time on the wire."""
    one_s = costs.stage_s(1)
    return max(
        (
            n
            for n in range(1, MAX_SEGMENT_LEN + 1)
            if costs.stage_s(n) <= 1.1 * one_s and costs.wire_s(n) <= 0.35 * one_s
        ),
        default=1,
    )


class Pace:
    """One request's pace. All times are on the driver's clock, in seconds."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.segment_len = free_rows(costs)
        self.slot_s = self._slot_s(self.segment_len)  # how long a full segment keeps the slowest stage or link busy
        self._hop_s = 0.0  # the shortest that was seen
        self._knows_hop = False
        self._sent_s: dict[int, float] = {}  # by segment id
        self._start_s = 0.0  # when the last segment sent meets worker 1 free
        self._free_s = 0.0  # when the pipeline can take the next one

    @property
    def due_s(self) -> float:
        """When to send the next segment."""
        return self._free_s - self._hop_s

    def note_sent(self, segment_id: int, num_rows: int, now: float) -> None:
        self._sent_s[segment_id] = now
        self._start_s = max(self._free_s, now + self._hop_s)
        self._free_s = self._start_s + self._slot_s(num_rows)

    def _slot_s(self, num_rows: int) -> float:
        return max(self._costs.stage_s(num_rows), self._costs.wire_s(num_rows))

    def note_miss(self, now: float) -> None:
        """All that is under way is dead, and ends where the commit meets it."""
        self._free_s = min(self._free_s, now + self._hop_s)

    def note_result(self, result: Result, now: float) -> None:
        """A result's way, less the forwards in it, is its hops and its waiting; the shortest had least waiting."""
        sent_s = self._sent_s.pop(result.segment_id, None)
        if sent_s is None:
            return
        computing_s = sum(timing.end_s - timing.start_s for timing in result.timings)
        hop_s = (now - sent_s - computing_s) / (len(result.timings) + 1)
        self._hop_s = min(self._hop_s, hop_s) if self._knows_hop else hop_s
        self._knows_hop = True
