"""What became of one request: counts, which docs/METHODOLOGY.md defines."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowspec.wire.messages import Timing


@dataclass
class SegmentStats:
    """What became of one segment."""

    num_sent: int
    sent_s: float  # when the driver began to send it, on its clock
    num_verified: int = 0  # nodes that were alive when the result came
    num_accepted: int = 0  # nodes that became output, roots included


@dataclass
class Stats:
    """Counts of one generation; see docs/METHODOLOGY.md for the definitions."""

    segments: int = 0  # segments sent, prefill and empty ones excluded
    rows: int = 0  # nodes sent in them
    drafted: int = 0  # draft nodes sent (roots that no draft had guessed excluded)
    accepted: int = 0  # draft nodes that became output
    restarts: int = 0  # times the target's token was not in the tree
    verdicts: int = 0  # verifications that emitted tokens
    accepted_by_position: list[int] = field(default_factory=list)  # verdicts that accepted so many draft nodes or more
    verified: int = 0  # segments whose result verified at least one node that was alive
    draft_passes: int = 0
    preemptions: int = 0  # times that the request gave its caches up and began again behind what it had emitted
    timings: list[tuple[Timing, ...]] = field(default_factory=list)  # one entry per result, one timing per stage
    by_segment: dict[int, SegmentStats] = field(default_factory=dict)  # by segment id

    @property
    def pruned(self) -> int:
        """Nodes that died on their way, before a result came back."""
        return sum(segment.num_sent - segment.num_verified for segment in self.by_segment.values())

    @property
    def mean_accepted(self) -> float:
        """Accepted draft nodes per verified segment."""
        return self.accepted / self.verified if self.verified else 0.0

    def note_verdict(self, segment_ids: list[int], num_accepted: int) -> None:
        """Rows of these segments, one each, have brought so many draft nodes into the output."""
        self.accepted += num_accepted
        self.verdicts += 1
        self.accepted_by_position += [0] * (num_accepted - len(self.accepted_by_position))
        for position in range(num_accepted):
            self.accepted_by_position[position] += 1
        for segment_id in segment_ids:
            if (segment := self.by_segment.get(segment_id)) is not None:
                segment.num_accepted += 1
