"""Spans -> a Chrome trace-event file, which ui.perfetto.dev and chrome://tracing open.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flowspec.errors import UsageError
from flowspec.request.records import Span

_MAX_PLACES = 1000  # thread ids are unique over all runs: viewers merge equal ones


@dataclass(frozen=True)
class TraceRun:
    """One run's spans on one time axis: a process in the trace, a panel in a plot."""

    name: str
    place_names: Sequence[str]  # the driver first
    spans: Sequence[Span]

    def __post_init__(self) -> None:
        assert len(self.place_names) <= _MAX_PLACES, f"{len(self.place_names)} places"
        for span in self.spans:
            assert 0 <= span.place < len(self.place_names), f"{span} is at none of {len(self.place_names)} places"
            assert span.start_s <= span.end_s, f"{span} ends before it starts"


def write_trace(path: Path | str, runs: Sequence[TraceRun]) -> None:
    """One process for each run, one thread for each place, one complete event for each span."""
    events = [event for pid, run in enumerate(runs, 1) for event in _events(pid, run)]
    try:
        Path(path).write_bytes(msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise UsageError(f"cannot write the trace to {path}: {error.strerror or error}") from None


def _events(pid: int, run: TraceRun) -> Iterator[dict[str, Any]]:
    yield _metadata(pid, 0, "process_name", name=run.name)
    yield _metadata(pid, 0, "process_sort_index", sort_index=pid)
    for place, name in enumerate(run.place_names):
        yield _metadata(pid, place, "thread_name", name=name)
        yield _metadata(pid, place, "thread_sort_index", sort_index=place)
    for span in sorted(run.spans, key=lambda s: (s.place, s.start_s, s.end_s)):
        # Whole nanoseconds, so that rounding never makes neighbours overlap.
        start_ns, end_ns = round(span.start_s * 1e9), round(span.end_s * 1e9)
        yield {
            "name": f"{span.work} {span.num_rows} rows" if span.num_rows else span.work,
            "cat": span.work,
            "ph": "X",
            "pid": pid,
            "tid": _tid(pid, span.place),
            "ts": start_ns / 1000,
            "dur": (end_ns - start_ns) / 1000,
            "args": {"rows": span.num_rows, "segment_id": span.segment_id},
        }


def _metadata(pid: int, place: int, kind: str, **args: str | int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": _tid(pid, place), "args": args}


def _tid(pid: int, place: int) -> int:
    return pid * _MAX_PLACES + place
