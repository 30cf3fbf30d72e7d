"""Who worked when. The engine's thread only appends to ``inbox``; all else belongs to the event loop. Nothing locks.

A forward is known by its result: one whose rows all died comes back nowhere, and does not show.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, TypeAlias

from flowspec.cluster.trips import Trip
from flowspec.request.stats import SegmentStats
from flowspec.request.work import Work
from flowspec.wire.messages import Timing

KEPT_S = 30.0
MAX_SPANS = 30_000
INBOX_LEN = 8192  # while nobody reads, the oldest go; some seconds of a busy engine
OPEN_S = 2.0  # after this long the rows of a result have been decided

DRIVER_PLACE = 0


class DriverWork(NamedTuple):
    kind: Work
    num_rows: int
    start_s: float
    end_s: float
    request_id: int | None  # known of the work on a result
    segment_id: int  # -1: unknown


class Forwards(NamedTuple):
    """Of one segment, at all stages."""

    request_id: int
    segment_id: int
    timings: tuple[Timing, ...]
    stats: SegmentStats | None  # written to until the rows are decided; ``None`` for a part of the prompt


class Emission(NamedTuple):
    """Tokens that came out, and what the request's counts grew by since those before."""

    time_s: float
    num_tokens: int
    num_accepted: int
    num_verified: int


Note: TypeAlias = DriverWork | Forwards | Emission


class Span(NamedTuple):
    """One bar of the page, under the names that it has there. Of forwards the three counts add up to ``rows``."""

    place: int
    start_s: float  # on the driver's clock
    end_s: float
    work: str
    request: str | None
    segment: int
    rows: int
    accepted: int = 0  # of rows: became output
    wasted: int = 0  # were verified, and ruled out
    pruned: int = 0  # had died by the time that their result came
    prefill: bool = False
    shared: int = 0  # rows of the whole forward, other requests' segments included


@dataclass
class _Open:
    """Spans of a result whose rows may not have been decided."""

    spans: list[Span]
    stats: SegmentStats
    fate: tuple[int, int]  # accepted and verified nodes, as the spans say


class Timeline:
    """The spans and emissions of the last seconds. A span whose counts change comes again, as a newer one."""

    def __init__(self) -> None:
        self.inbox: deque[Note] = deque(maxlen=INBOX_LEN)
        self.num_spans = 0  # so far; also the number of the next one
        self._spans: deque[tuple[int, Span]] = deque(maxlen=MAX_SPANS)  # numbered
        self._open: deque[_Open] = deque(maxlen=INBOX_LEN)
        self._emissions: deque[Emission] = deque()

    def read(self, now_s: float, names: Mapping[int, str], trips: Mapping[int, Trip]) -> None:
        """Take in what has happened. ``names``: by request id; ``trips``: by stage."""
        for opened in self._open:
            if (fate := _fate(opened.stats)) != opened.fate:
                opened.fate = fate
                opened.spans = [_with_fate(span, fate) for span in opened.spans]
                self._add(opened.spans)
        while self.inbox:
            self._take(self.inbox.popleft(), names, trips)
        while self._spans and self._spans[0][1].end_s < now_s - KEPT_S:
            self._spans.popleft()
        while self._open and self._open[0].spans[-1].end_s < now_s - OPEN_S:
            self._open.popleft()
        while self._emissions and self._emissions[0].time_s < now_s - KEPT_S:
            self._emissions.popleft()

    def _take(self, note: Note, names: Mapping[int, str], trips: Mapping[int, Trip]) -> None:
        match note:
            case DriverWork(kind, num_rows, start_s, end_s, request_id, segment_id):
                request = None if request_id is None else names.get(request_id)
                span = Span(DRIVER_PLACE, start_s, end_s, kind.value, request, segment_id, num_rows)
                self._add([span])
            case Forwards(request_id, segment_id, timings, stats):
                request = names.get(request_id)
                ran = [timing for timing in timings if timing.num_rows]
                spans = [_forward(timing, request, segment_id, trips.get(timing.stage)) for timing in ran]
                if stats is not None and spans:
                    fate = _fate(stats)
                    spans = [_with_fate(span, fate) for span in spans]
                    self._open.append(_Open(spans, stats, fate))
                self._add(spans)
            case Emission():
                self._emissions.append(note)

    def _add(self, spans: list[Span]) -> None:
        for span in spans:
            self._spans.append((self.num_spans, span))
            self.num_spans += 1

    def newer(self, number: int) -> list[Span]:
        """Spans from this number on."""
        return [span for _, span in takewhile(lambda entry: entry[0] >= number, reversed(self._spans))][::-1]

    def since(self, start_s: float) -> list[Span]:
        """Spans that ended after this time."""
        return [span for _, span in self._spans if span.end_s > start_s]

    def emissions(self, start_s: float) -> list[Emission]:
        return [emission for emission in self._emissions if emission.time_s > start_s]


def _forward(timing: Timing, request: str | None, segment_id: int, trip: Trip | None) -> Span:
    """A prefill, until a fate is known."""
    offset_s = 0.0 if trip is None else trip.to_driver_s
    start_s, end_s, rows = timing.start_s + offset_s, timing.end_s + offset_s, timing.num_rows
    span = Span(timing.stage, start_s, end_s, "forward", request, segment_id, rows, shared=timing.num_shared)
    return span._replace(accepted=rows, prefill=True)


def _fate(stats: SegmentStats) -> tuple[int, int]:
    accepted = stats.num_accepted  # first: nothing is accepted before it is verified
    return accepted, stats.num_verified


def _with_fate(span: Span, fate: tuple[int, int]) -> Span:
    accepted, verified = fate
    return span._replace(accepted=accepted, wasted=verified - accepted, pruned=span.rows - verified, prefill=False)
