"""What a run leaves behind, for tables, JSON, plots and traces. docs/METHODOLOGY.md defines the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowspec.request.emissions import Emissions

if TYPE_CHECKING:
    from flowspec.request.stats import Stats  # which needs torch, by the messages


@dataclass(frozen=True)
class Span:
    """One piece of work at one place; seconds since the request was submitted."""

    place: int  # 0 is the driver, workers are 1, 2, ...
    start_s: float
    end_s: float
    work: str  # "forward" at workers; at the driver the kinds of ``work.Work``
    num_rows: int = 0  # nodes that were computed
    segment_id: int = -1  # of forwards, else -1


@dataclass(frozen=True)
class SegmentRecord:
    """What became of one segment that was sent after the prefill."""

    segment_id: int
    sent_s: float
    num_sent: int  # nodes, the root included
    num_verified: int  # nodes that were alive when the result came
    num_accepted: int  # nodes that became output, roots included


@dataclass(frozen=True)
class RequestRecord:
    """One generation by one schedule. Times are seconds since the request was submitted."""

    index: int  # of the prompt
    token_ids: tuple[int, ...]
    emissions: Emissions
    segments: int
    rows: int  # nodes sent
    drafted: int
    accepted: int
    verified: int  # segments whose result verified at least one living node
    restarts: int
    draft_passes: int
    link_bytes: int  # on all links, message headers included
    busy_s: tuple[float, ...]  # of every place, the driver first, from the first emission to the last
    segment_records: tuple[SegmentRecord, ...] = ()
    spans: tuple[Span, ...] = ()  # empty unless a trace was asked for

    @classmethod
    def of(
        cls,
        index: int,
        token_ids: Sequence[int],
        emissions: Emissions,
        stats: Stats,
        spans: Sequence[Span],
        num_places: int,
        link_bytes: int,
        with_spans: bool,
        start_s: float = 0.0,
    ) -> RequestRecord:
        """``start_s``: of the request, on the driver's clock; ``emissions`` and ``spans`` count from there already."""
        busy_s = [0.0] * num_places
        for span in spans:
            busy_s[span.place] += max(
                0.0, min(span.end_s, emissions.last_s) - max(span.start_s, emissions.decode_start_s)
            )
        return cls(
            index,
            tuple(token_ids),
            emissions,
            stats.segments,
            stats.rows,
            stats.drafted,
            stats.accepted,
            stats.verified,
            stats.restarts,
            stats.draft_passes,
            link_bytes,
            tuple(busy_s),
            tuple(
                SegmentRecord(i, sent.sent_s - start_s, sent.num_sent, sent.num_verified, sent.num_accepted)
                for i, sent in stats.by_segment.items()
            ),
            tuple(spans) if with_spans else (),
        )

    @property
    def end_s(self) -> float:
        """When the last token was emitted."""
        return self.emissions.last_s

    @property
    def decode_s(self) -> float:
        """From the first emission to the last; of the whole run when all tokens came at once."""
        return self.emissions.decode_s

    @property
    def num_decoded(self) -> int:
        """Tokens that were emitted in ``decode_s``."""
        return self.emissions.num_decoded


def forward_spans(stats: Stats, start_s: float, to_driver_s: Mapping[int, float]) -> list[Span]:
    """What the workers say of the segments that came back, since ``start_s`` on the driver's clock.

    ``to_driver_s``: by stage, what makes a time on its clock one on the driver's; 0 where nothing is said.
    """
    spans: list[Span] = []
    for timing in (timing for timings in stats.timings for timing in timings):
        zero_s = start_s - to_driver_s.get(timing.stage, 0.0)  # of the request, on the worker's clock
        spans.append(Span(timing.stage, timing.start_s - zero_s, timing.end_s - zero_s, "forward", timing.num_rows))
    return spans


@dataclass(frozen=True)
class ScheduleResult:
    """One schedule over all its requests: one entry of ``results`` in the JSON."""

    schedule: str
    tokens_per_s: float  # decode rate: all decoded tokens by all decode time
    mean_accepted: float  # draft nodes accepted per verified segment
    rows_per_segment: float  # nodes sent per segment
    restarts: int
    stage_busy: tuple[float, ...]  # share of the decode time in which each stage computed
    driver_busy: float
    link_bytes: int
    num_tokens: int
    virtual_s: float  # from the first request's submission to the last one's end, one after the other

    @classmethod
    def of(cls, schedule: str, records: Sequence[RequestRecord]) -> ScheduleResult:
        """Totals, so that long answers count for what they are."""
        assert records, "no request was run"
        decode_s = sum(record.decode_s for record in records)
        busy_s = [sum(column) for column in zip(*(record.busy_s for record in records), strict=True)]
        verified, segments = sum(r.verified for r in records), sum(r.segments for r in records)
        return cls(
            schedule,
            sum(r.num_decoded for r in records) / decode_s,
            sum(r.accepted for r in records) / verified if verified else 0.0,
            sum(r.rows for r in records) / segments if segments else 0.0,
            sum(r.restarts for r in records),
            tuple(busy / decode_s for busy in busy_s[1:]),
            busy_s[0] / decode_s,
            sum(r.link_bytes for r in records),
            sum(len(r.token_ids) for r in records),
            sum(r.end_s for r in records),
        )
