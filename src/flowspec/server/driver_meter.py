"""Times the driver's work, on the engine's thread."""

from __future__ import annotations

import time
from types import TracebackType

from flowspec.request.generation import Generation
from flowspec.request.meter import Work
from flowspec.server.timeline import DriverWork, Timeline

_ON_RESULTS = (Work.LM_HEAD, Work.VERIFY)


class DriverMeter:
    """A ``generation.Meter`` that notes each piece of work in a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self.busy_s = 0.0
        self._timeline = timeline
        self._newest: tuple[Generation, int] | None = None  # whose result came last, and its segment

    def work(self, kind: Work, num_rows: int) -> _Stopwatch:
        return _Stopwatch(self, kind, num_rows)

    def on_result(self, generation: Generation, segment_id: int) -> None:
        """The driver is about to read this result."""
        self._newest = generation, segment_id

    def forget(self) -> None:
        """Let go of the generation whose result came last."""
        self._newest = None

    def note(self, kind: Work, num_rows: int, start_s: float, end_s: float) -> None:
        self.busy_s += end_s - start_s
        request_id, segment_id = None, -1
        if self._newest is not None and kind in _ON_RESULTS:
            generation, newest_id = self._newest
            # Schedules in lock-step may read an earlier result first; what was read is in flight no more.
            if newest_id not in generation.in_flight:
                request_id, segment_id = generation.request.request_id, newest_id
        self._timeline.inbox.append(DriverWork(kind, num_rows, start_s, end_s, request_id, segment_id))


class _Stopwatch:
    """One piece of work."""

    __slots__ = ("_kind", "_meter", "_num_rows", "_start_s")

    def __init__(self, meter: DriverMeter, kind: Work, num_rows: int) -> None:
        self._meter, self._kind, self._num_rows = meter, kind, num_rows

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.note(self._kind, self._num_rows, self._start_s, time.perf_counter())
