"""The worker: one stage and the segments on their way through it. An actor without sockets, clock or threads."""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowspec.errors import ProtocolError, described, shortened
from flowspec.model.stage import Stage, Watch
from flowspec.model.taps import Taps, TapSum
from flowspec.wire.actor import Route, Send
from flowspec.wire.messages import (
    Broken,
    Close,
    Closed,
    Commit,
    DataMessage,
    End,
    Failed,
    Forget,
    Message,
    Open,
    Reserve,
    Segment,
    Step,
    Timing,
)
from flowspec.worker.checks import Checks, Limits
from flowspec.worker.hints import HINT_SHARE, Hinter, Hints
from flowspec.worker.placed import Ints, Placed, place
from flowspec.worker.requests import RequestMessage, Requests

PATIENCE_S = 0.002  # a forward is interrupted no more often, to look for commits


@dataclass
class _Forward:
    """A forward of one segment, or of several requests' at once, as far as it has come."""

    segments: list[Placed]
    steps: Generator[Tensor | None]
    start_s: float
    features: TapSum | None  # ``None``: nobody wants any


class Worker:
    """Runs one stage.

    ``on_message`` takes a message without working on it: a commit is applied at once, the data path queues. ``on_idle``
    works off one queued message, in pieces of ``PATIENCE_S``. So every commit that has arrived is applied before the
    next segment starts, a forward whose rows have all died stops between two layers, and nothing ever waits for a
    commit.

    The way of a segment: ``_next_message`` takes it from the queue, ``_begin`` gives its living rows slots and looks
    who else may share the forward, ``_go_on`` runs some layers at a time, ``_finish`` and ``_pass_on`` send what is
    still alive to the next worker or the driver. A worker with a ``hinter`` then tells the driver what it guesses.

    What goes wrong with one request (no memory for its cache, a message that contradicts what came before) is told to
    the driver and ends that request alone.
    """

    def __init__(
        self,
        stage: Stage,
        index: int,
        clock: Callable[[], float],
        patience_s: float | None = PATIENCE_S,
        hinter: Hinter | None = None,
        hint_share: float = HINT_SHARE,
        forward_s: Callable[[int], float] | None = None,
        layers: str = "",
        limits: Limits | None = None,
        taps: Taps | None = None,
        guesser: Hinter | None = None,
        num_best: int = 0,
    ) -> None:
        """``patience_s``: a forward looks for commits after as long, between layers; ``None``: never.

        ``hint_share``: of a forward's time that a hint may take at most, or none is made. ``forward_s``: of so many
        rows; requests share no forward where it is unknown. ``layers``: the stage's, for whoever looks for a fault.
        ``limits``: of its model. ``taps``: of the session's draft, if it reads several layers. ``guesser``: of a draft
        model, which answers with its ``num_best`` guesses and not with hidden states.
        """
        self.link_bytes = 0  # received on the data path; the shell counts
        self._stage = stage
        self._index = index
        self._layers = layers
        self._clock = clock
        self._patience_s = math.inf if patience_s is None else patience_s
        self._forward_s = forward_s
        self._taps = taps
        self._requests = Requests(stage, () if taps is None else taps.shape.layers)
        self._checks = Checks(stage, index, limits or Limits(), self._requests, taps)
        self._hints = None if hinter is None else Hints(hinter, hint_share, clock)
        self._guesser, self._num_best = guesser, num_best
        self._queue: deque[DataMessage] = deque()
        self._running: _Forward | None = None
        self._again: deque[Placed] = deque()  # of a shared forward that failed: each runs alone
        self._failures: list[Send] = []

    wake_s = math.inf  # a worker has work when a message has come, and only then

    def on_message(self, message: Message) -> list[Send]:
        """Raises ``ProtocolError`` for a message that no worker takes."""
        match message:
            case Commit() | End() | Step() | Open() | Segment() | Reserve() | Close():
                try:
                    self._take(message)
                except ProtocolError as error:
                    self._fail(message, error)
            case Forget():
                self._queue.append(message)
            case _:
                raise ProtocolError(f"a worker takes no {type(message).__name__} during a session")
        return self._take_failures()

    def _take(self, message: RequestMessage) -> None:
        """A segment that breaks the protocol goes no further; what ends a request always does."""
        if not isinstance(message, Close):
            self._checks.check(message)
        if isinstance(message, (Commit, End, Step)):
            self._requests.control(message)
        else:
            self._queue.append(message)

    def on_idle(self) -> list[Send] | None:
        """Go on with the forward under way, else work off the oldest queued message that may run; ``None``: no work."""
        if self._running is not None:
            sends = self._go_on(self._running)
        elif self._again:
            sends = self._start([self._again.popleft()])
        elif self._hints is not None and (passed_on := self._hints.take()) is not None:
            sends = self._hint(self._hints, passed_on)
        elif (message := self._next_message()) is not None:
            sends = self._work_off(message)
        else:
            return None
        return [*sends, *self._take_failures()]

    def _next_message(self) -> DataMessage | None:
        """Take the oldest; a request whose oldest segment waits for a step lets the others' messages pass."""
        waiting: set[int] = set()
        for index, message in enumerate(self._queue):
            if message.request_id not in waiting and not self._is_gated(message):
                del self._queue[index]
                return message
            waiting.add(message.request_id)
        return None

    def _is_gated(self, message: DataMessage) -> bool:
        if not isinstance(message, Segment) or message.gate is None:
            return False
        request = self._requests.find(message)
        return request is not None and message.gate > request.step

    def _work_off(self, message: DataMessage) -> list[Send]:
        """Segments are run; all else takes effect here, and goes on to the next worker."""
        match message:
            case Segment():
                return self._begin(message)
            case Open():
                try:
                    self._requests.open(message)
                except Exception as error:
                    self._fail(message, error)
            case Reserve():
                self._requests.reserve(message)
            case Close():
                self._requests.close(message)
                if self._stage.is_last:
                    return [Send(Route.DRIVER, Closed(message.request_id, message.epoch))]
            case Forget():
                self._requests.forget(message)
        return [] if self._stage.is_last else [Send(Route.NEXT, message)]

    def _begin(self, segment: Segment) -> list[Send]:
        """Run the rows that are alive; a free segment with none is dropped without a word."""
        if (first := self._place(segment)) is None:
            return []
        return self._start([first] if segment.gate is not None else [first, *self._take_companions(first)])

    def _place(self, segment: Segment) -> Placed | None:
        try:
            request = self._requests.find(segment)
            if request is None:
                return None
            self._checks.check_place(segment, request)
            return place(segment, request)
        except Exception as error:
            self._fail(segment, error)
            return None

    def _take_companions(self, first: Placed) -> list[Placed]:
        """The oldest waiting segments of other requests, as long as each costs at most half of what it would alone."""
        companions: list[Placed] = []
        forward_s = self._forward_s
        if forward_s is None or not self._queue:
            return companions
        num_rows, seen = len(first.rows), {first.segment.request_id}
        for message in list(self._queue):
            if message.request_id in seen:
                continue
            seen.add(message.request_id)  # whether it joins or not: a request's messages keep their order
            if not isinstance(message, Segment) or message.gate is not None:
                continue
            num_more = len(message.node_ids)
            if forward_s(num_rows + num_more) > forward_s(num_rows) + forward_s(num_more) / 2:
                continue
            self._queue.remove(message)
            if (placed := self._place(message)) is not None:
                companions.append(placed)
                num_rows += len(placed.rows)
        return companions

    def _start(self, segments: list[Placed]) -> list[Send]:
        features = self._features_of(segments)
        watch = features if self._taps is not None and self._taps.num_blocks else None
        self._running = _Forward(segments, _steps(self._stage, segments, watch), self._clock(), features)
        return self._go_on(self._running)

    def _features_of(self, segments: list[Placed]) -> TapSum | None:
        """What the stages before have added up for all rows; ``None`` when nobody wants features."""
        taps = self._taps
        if taps is None or not any(placed.request.want_taps for placed in segments):
            return None
        # A segment without a row meets no layer: its sum is complete as it is.
        if not taps.is_begun and not (taps.num_blocks and not any(len(placed.rows) for placed in segments)):
            return TapSum(taps, None)
        width = taps.shape.width
        return TapSum(taps, torch.cat([placed.features(width, taps.dtype) for placed in segments]))

    def _go_on(self, forward: _Forward) -> list[Send]:
        """Run some layers, unless all rows have died meanwhile; pass the living rows on when it was the last one."""
        if not any(placed.segment.gate is not None or len(placed.living()) for placed in forward.segments):
            forward.steps.close()
            self._running = None
            return []
        until_s = self._clock() + self._patience_s
        try:
            for hidden in forward.steps:
                if hidden is not None:
                    self._running = None
                    return self._finish(forward, hidden)
                if self._clock() >= until_s:
                    return []
            raise AssertionError("a stage's last step has hidden states")
        except Exception as error:
            self._running = None
            if len(forward.segments) > 1:  # whose fault it is shows when each runs alone
                self._again.extend(forward.segments)
            else:
                self._fail(forward.segments[0].segment, error)
            return []

    def _finish(self, forward: _Forward, hidden: Tensor) -> list[Send]:
        """Each segment goes its own way."""
        lengths = [len(placed.rows) for placed in forward.segments]
        end_s = self._clock()
        total = None if forward.features is None else forward.features.total
        all_features = [None] * len(lengths) if total is None else total.split(lengths)
        sends: list[Send] = []
        for placed, rows, features in zip(forward.segments, hidden.split(lengths), all_features, strict=True):
            timing = Timing(self._index, len(placed.rows), forward.start_s, end_s, self.link_bytes, sum(lengths))
            sends += self._pass_on(placed, rows, timing, features if placed.request.want_taps else None)
        return sends

    def _pass_on(self, placed: Placed, hidden: Tensor, timing: Timing, features: Tensor | None) -> list[Send]:
        """Nothing, when a free segment's rows have all died meanwhile."""
        living = placed.living()
        if not len(living) and placed.segment.gate is None:
            return []
        rows = placed.rows[living]
        if len(rows) < len(placed.rows):
            hidden = hidden[torch.from_numpy(living)]
            features = None if features is None else features[torch.from_numpy(living)]
        sends = self._find_broken(placed.segment, rows, hidden)
        if self._guesser is not None:
            return [*sends, Send(Route.DRIVER, placed.guesses(rows, hidden, self._guesser, self._num_best))]
        if self._stage.is_last:
            return [*sends, Send(Route.DRIVER, placed.result(rows, hidden, timing, features))]
        passed_on = placed.passed_on(rows, hidden, timing, features)
        if self._hints is not None and placed.request.want_hints:
            self._hints.offer(passed_on, timing.end_s - timing.start_s)
        return [*sends, Send(Route.NEXT, passed_on)]

    def _find_broken(self, segment: Segment, rows: Ints, hidden: Tensor) -> list[Send]:
        is_finite = torch.isfinite(hidden)
        if bool(is_finite.all()):
            return []
        broken = rows[np.flatnonzero(~is_finite.all(dim=-1).cpu().numpy())]
        node_ids = [segment.node_ids[row] for row in broken]
        return [Send(Route.DRIVER, Broken(segment.request_id, segment.epoch, self._index, self._layers, node_ids))]

    def _hint(self, hints: Hints, passed_on: Segment) -> list[Send]:
        try:
            return [Send(Route.DRIVER, hints.hint_at(passed_on))]
        except Exception as error:
            self._fail(passed_on, error)
            return []

    def _fail(self, message: RequestMessage, error: Exception) -> None:
        """The request ends here, and by the driver's word everywhere. Raises an ``error`` that nothing survives."""
        if isinstance(error, torch.AcceleratorError):  # whatever the device is asked for next fails too
            raise error
        if (request := self._requests.find(message)) is not None:
            request.is_over = True
        told = "".join(traceback.format_exception(error))
        failed = Failed(message.request_id, message.epoch, self._index, shortened(described(error)), told)
        self._failures.append(Send(Route.DRIVER, failed))

    def _take_failures(self) -> list[Send]:
        failures, self._failures = self._failures, []
        return failures

    def check_integrity(self) -> None:
        """Assert the invariants of all caches."""
        self._requests.check_integrity()

    @property
    def num_open(self) -> int:
        """Requests that hold a cache here."""
        return self._requests.num_open

    @property
    def num_cached(self) -> int:
        """Requests that have ended, and whose caches are kept."""
        return self._requests.num_cached


def _steps(stage: Stage, segments: list[Placed], watch: Watch | None) -> Generator[Tensor | None]:
    """A generator of our own, so that inputs that cannot be joined are found where a forward's faults are.

    It does not know the worker, whose caches are free as soon as its session is over.
    """
    yield from stage.steps([placed.part() for placed in segments], watch)
