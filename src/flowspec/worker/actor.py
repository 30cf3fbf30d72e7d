"""The worker: one stage and the caches of its requests. An actor without sockets, clock or threads of its own."""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.errors import ProtocolError, described
from flowspec.model.stage import Part, Stage, StageCache
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
    Hint,
    Message,
    Open,
    Reserve,
    Result,
    Segment,
    Step,
    Timing,
)

NUM_GUESSES = 16  # tokens that a hint names for each row
PATIENCE_S = 0.002  # a forward is interrupted no more often, to look for commits
HINT_SHARE = 0.25  # of a forward's time; dearer hints keep the segments that follow waiting
_MAX_ENDED = 64  # requests and epochs
_NUM_TRIALS = 3  # hints until it is known what one takes

Ints: TypeAlias = NDArray[np.int64]


@dataclass
class _OpenRequest:
    epoch: int
    cache: StageCache
    want_features: bool
    want_hints: bool
    step: int = 0  # the newest step of a lock-step schedule
    is_over: bool = False  # all of its rows are dead, whatever the cache says


@dataclass
class _Placed:
    """A segment whose living rows have slots."""

    segment: Segment
    rows: Ints  # of the segment, that are run
    slots: Ints
    request: _OpenRequest

    def part(self) -> Part:
        segment = self.segment
        inputs = torch.tensor(segment.token_ids) if segment.hidden is None else segment.hidden
        if len(self.rows) < len(segment.node_ids):
            inputs = inputs[torch.from_numpy(self.rows)]
        return Part(inputs, self.slots, self.request.cache)

    def living(self) -> Ints:
        """Which of the rows are alive; prefix rows live as long as the request."""
        if self.request.is_over:
            return np.zeros(0, dtype=np.int64)
        ids, num_prefix, slots = self.segment.node_ids, self.segment.num_prefix, self.request.cache.slots
        is_alive = [row < num_prefix or slots.slot_of(ids[row]) is not None for row in self.rows.tolist()]
        return np.flatnonzero(is_alive)


@dataclass
class _Forward:
    """A forward of one segment, or of several requests' at once, as far as it has come."""

    segments: list[_Placed]
    steps: Generator[Tensor | None]
    start_s: float


class Hinter(Protocol):
    """Guesses next tokens from what a worker passes on: ``model.hint_head.HintHead``, or what stands in for it."""

    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H] -> the ``k`` best tokens, best first, and their log-probabilities, both [n, k]."""
        ...


class Worker:
    """Runs one stage.

    Segments of several requests that wait run as one forward, as far as that is cheaper than one after the other.

    ``on_message`` takes a message without working on it: a commit is applied at once, the data path queues. ``on_idle``
    works off one queued message, in pieces of ``PATIENCE_S``. So every commit that has arrived is applied before the
    next segment starts, a forward whose rows have all died stops between two layers, and nothing ever waits for a
    commit. A worker with a ``hinter`` tells the driver what it guesses of a segment, once that has been passed on.

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
    ) -> None:
        """``patience_s``: a forward looks for commits after as long, between layers; ``None``: never.

        ``hint_share``: of a forward's time that a hint may take at most, or none is made. ``forward_s``: of so many
        rows; requests share no forward where it is unknown. ``layers``: the stage's, for whoever looks for a fault.
        """
        self.link_bytes = 0  # received on the data path; the shell counts
        self._stage = stage
        self._index = index
        self._layers = layers
        self._clock = clock
        self._patience_s = math.inf if patience_s is None else patience_s
        self._requests: dict[int, _OpenRequest] = {}
        self._ended: deque[tuple[int, int]] = deque(maxlen=_MAX_ENDED)  # whose ``End`` overtook their ``Open``, maybe
        self._queue: deque[DataMessage] = deque()
        self._hinter = hinter
        self._hint_share = hint_share
        self._hint_s: list[float] = []  # what the first ones took
        self._forward_s = forward_s
        self._kept: dict[int, StageCache] = {}  # of requests that have ended, for their heirs
        self._running: _Forward | None = None
        self._again: deque[_Placed] = deque()  # of a shared forward that failed: each runs alone
        self._failures: list[Send] = []
        self._passed_on: deque[Segment] = deque()  # to be hinted at

    wake_s = math.inf  # a worker has work when a message has come, and only then

    def on_message(self, message: Message) -> list[Send]:
        """Raises ``ProtocolError`` for a message that no worker takes."""
        match message:
            case Commit() | End() | Step():
                request = self._requests.get(message.request_id)
                # A finished request, or an older epoch of it: what the message speaks of is gone.
                if request is not None and request.epoch == message.epoch:
                    self._control(request, message)
                elif isinstance(message, End):
                    self._ended.append((message.request_id, message.epoch))
            case Open() | Segment() | Reserve() | Close() | Forget():
                self._queue.append(message)
            case _:
                raise ProtocolError(f"a worker takes no {type(message).__name__} during a session")
        return self._take_failures()

    def _control(self, request: _OpenRequest, message: Commit | End | Step) -> None:
        match message:
            case Commit() if not request.is_over:
                try:
                    request.cache.slots.commit(message.prefix_ids, message.root_id)
                except ProtocolError as error:
                    self._fail(message.request_id, message.epoch, error)
            case Commit():
                pass
            case End():
                request.is_over = True
            case Step():
                request.step = max(request.step, message.number)

    def on_idle(self) -> list[Send] | None:
        """Go on with the forward under way, else work off the oldest queued message that may run; ``None``: no work."""
        if self._running is not None:
            sends = self._go_on(self._running)
        elif self._again:
            sends = self._start([self._again.popleft()])
        elif self._passed_on and self._hinter is not None:
            sends = self._try_hint(self._passed_on.popleft(), self._hinter)
        elif (message := self._next_message()) is not None:
            sends = self._work_off(message)
        else:
            return None
        return [*sends, *self._take_failures()]

    def _work_off(self, message: DataMessage) -> list[Send]:
        match message:
            case Segment():
                return self._begin(message)
            case Open():
                try:
                    self._open(message)
                except Exception as error:
                    self._fail(message.request_id, message.epoch, error)
            case Reserve():
                request = self._requests.get(message.request_id)
                if request is not None and request.epoch == message.epoch:
                    request.cache.slots.limit = message.num_slots
            case Close():
                self._close(message)
                if self._stage.is_last:
                    return [Send(Route.DRIVER, Closed(message.request_id, message.epoch))]
            case Forget():
                self._kept.pop(message.request_id, None)
        return [] if self._stage.is_last else [Send(Route.NEXT, message)]

    def _fail(self, request_id: int, epoch: int, error: Exception) -> None:
        """The request ends here, and by the driver's word everywhere. Raises an ``error`` that nothing survives."""
        if isinstance(error, torch.AcceleratorError):  # whatever the device is asked for next fails too
            raise error
        if (request := self._requests.get(request_id)) is not None and request.epoch == epoch:
            request.is_over = True
        told = "".join(traceback.format_exception(error))
        self._failures.append(Send(Route.DRIVER, Failed(request_id, epoch, self._index, described(error), told)))

    def _take_failures(self) -> list[Send]:
        failures, self._failures = self._failures, []
        return failures

    def _open(self, message: Open) -> None:
        if message.heir_of is None:
            cache = self._stage.open_cache(message.root_id)
        elif message.heir_of in self._kept:
            cache = self._kept.pop(message.heir_of)
            cache.slots.inherit(message.num_kept, message.root_id)
        else:
            raise ProtocolError(f"request {message.request_id} inherits from {message.heir_of}, which left nothing")
        cache.slots.limit = message.num_slots
        self._requests[message.request_id] = _OpenRequest(
            message.epoch, cache, message.want_features, message.want_hints
        )
        self._requests[message.request_id].is_over = (message.request_id, message.epoch) in self._ended

    def _close(self, message: Close) -> None:
        request = self._requests.pop(message.request_id, None)
        if request is not None and message.kept_ids is not None:
            request.cache.slots.settle(message.kept_ids)
            self._kept[message.request_id] = request.cache
        if not self._requests:
            self.check_integrity()  # now that nobody waits for anything

    def _next_message(self) -> DataMessage | None:
        """Take the oldest; a request whose oldest segment waits for a step lets the others' messages pass."""
        waiting: set[int] = set()
        for place, message in enumerate(self._queue):
            if message.request_id not in waiting and not self._is_gated(message):
                del self._queue[place]
                return message
            waiting.add(message.request_id)
        return None

    def _is_gated(self, message: DataMessage) -> bool:
        if not isinstance(message, Segment) or message.gate is None:
            return False
        request = self._requests.get(message.request_id)
        return request is not None and request.epoch == message.epoch and message.gate > request.step

    def _begin(self, segment: Segment) -> list[Send]:
        """Run the rows that are alive; a free segment with none is dropped without a word."""
        if (first := self._try_place(segment)) is None:
            return []
        return self._start([first] if segment.gate is not None else [first, *self._take_companions(first)])

    def _start(self, segments: list[_Placed]) -> list[Send]:
        self._running = _Forward(segments, self._steps(segments), self._clock())
        return self._go_on(self._running)

    def _steps(self, segments: list[_Placed]) -> Generator[Tensor | None]:
        yield from self._stage.steps([placed.part() for placed in segments])

    def _try_place(self, segment: Segment) -> _Placed | None:
        try:
            return self._place(segment)
        except Exception as error:
            self._fail(segment.request_id, segment.epoch, error)
            return None

    def _place(self, segment: Segment) -> _Placed | None:
        request = self._requests.get(segment.request_id)
        if request is None or request.epoch != segment.epoch:
            return None
        if request.is_over:
            none = np.zeros(0, dtype=np.int64)
            return None if segment.gate is None else _Placed(segment, none, none, request)
        if self._stage.is_first != (segment.token_ids is not None):
            raise ProtocolError("token ids belong on the first stage, hidden states on the others")
        table, num_prefix = request.cache.slots, segment.num_prefix
        prefix_slots = table.append_prefix(segment.positions[:num_prefix])
        kept, slots = table.place(
            segment.node_ids[num_prefix:], segment.parent_ids[num_prefix:], segment.positions[num_prefix:]
        )
        rows = np.concatenate([np.arange(num_prefix), kept + num_prefix])
        if not len(rows) and segment.gate is None:
            return None
        return _Placed(segment, rows, np.concatenate([prefix_slots, slots]), request)

    def _take_companions(self, first: _Placed) -> list[_Placed]:
        """The oldest waiting segments of other requests, as long as each costs at most half of what it would alone."""
        companions: list[_Placed] = []
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
            if (placed := self._try_place(message)) is not None:
                companions.append(placed)
                num_rows += len(placed.rows)
        return companions

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
                segment = forward.segments[0].segment
                self._fail(segment.request_id, segment.epoch, error)
            return []

    def _finish(self, forward: _Forward, hidden: Tensor) -> list[Send]:
        """Each segment goes its own way."""
        lengths = [len(placed.rows) for placed in forward.segments]
        end_s = self._clock()
        sends: list[Send] = []
        for placed, rows in zip(forward.segments, hidden.split(lengths), strict=True):
            timing = Timing(self._index, len(placed.rows), forward.start_s, end_s, self.link_bytes, sum(lengths))
            sends += self._pass_on(placed, rows, timing)
        return sends

    def _pass_on(self, placed: _Placed, hidden: Tensor, timing: Timing) -> list[Send]:
        """Nothing, when a free segment's rows have all died meanwhile."""
        segment, request = placed.segment, placed.request
        living = placed.living()
        if not len(living) and segment.gate is None:
            return []
        timings = [*segment.timings, timing]
        rows = placed.rows[living]
        if len(rows) < len(placed.rows):
            hidden = hidden[torch.from_numpy(living)]
        node_ids = [segment.node_ids[row] for row in rows]
        sends = self._find_broken(segment, node_ids, hidden)
        if not self._stage.is_last:
            passed_on = Segment(
                segment.request_id,
                segment.epoch,
                segment.segment_id,
                node_ids,
                [segment.parent_ids[row] for row in rows],
                [segment.positions[row] for row in rows],
                segment.num_prefix,
                token_ids=None,
                hidden=hidden,
                timings=timings,
                gate=None if segment.gate is None else segment.gate + 1,
            )
            wants_hint = request.want_hints and self._hinter is not None
            may_hint = wants_hint and self._is_hint_cheap(timing.end_s - timing.start_s)
            if may_hint and passed_on.num_prefix < len(node_ids):
                self._passed_on.append(passed_on)
            return [*sends, Send(Route.NEXT, passed_on)]
        if not request.want_features:
            node_ids, hidden = node_ids[segment.num_prefix :], hidden[segment.num_prefix :]
        result = Result(
            segment.request_id, segment.epoch, segment.segment_id, node_ids, segment.num_prefix, hidden, timings
        )
        return [*sends, Send(Route.DRIVER, result)]

    def _find_broken(self, segment: Segment, node_ids: list[int], hidden: Tensor) -> list[Send]:
        is_finite = torch.isfinite(hidden)
        if bool(is_finite.all()):
            return []
        broken = [node_ids[row] for row in np.flatnonzero(~is_finite.all(dim=-1).cpu().numpy())]
        return [Send(Route.DRIVER, Broken(segment.request_id, segment.epoch, self._index, self._layers, broken))]

    def _try_hint(self, segment: Segment, hinter: Hinter) -> list[Send]:
        try:
            return self._hint(segment, hinter)
        except Exception as error:
            self._fail(segment.request_id, segment.epoch, error)
            return []

    def _hint(self, segment: Segment, hinter: Hinter) -> list[Send]:
        assert segment.hidden is not None
        start_s, num_prefix = self._clock(), segment.num_prefix
        token_ids, logprobs = hinter.guess(segment.hidden[num_prefix:], NUM_GUESSES)
        if len(self._hint_s) < _NUM_TRIALS:
            self._hint_s.append(self._clock() - start_s)
        node_ids = segment.node_ids[num_prefix:]
        hint = Hint(segment.request_id, segment.epoch, node_ids, token_ids.tolist(), logprobs.tolist())
        return [Send(Route.DRIVER, hint)]

    def _is_hint_cheap(self, forward_s: float) -> bool:
        return len(self._hint_s) < _NUM_TRIALS or min(self._hint_s) <= self._hint_share * forward_s

    def check_integrity(self) -> None:
        """Assert the invariants of all caches."""
        for cache in (*self._kept.values(), *(request.cache for request in self._requests.values())):
            cache.slots.check_integrity()

    @property
    def num_open(self) -> int:
        """Requests that hold a cache here."""
        return len(self._requests)

    @property
    def num_kept(self) -> int:
        """Requests that have ended and left their cache for an heir."""
        return len(self._kept)
