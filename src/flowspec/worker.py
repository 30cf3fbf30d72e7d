"""The worker: one stage and the caches of its requests. An actor without sockets, clock or threads of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.errors import ProtocolError
from flowspec.messages import (
    Close,
    Closed,
    Commit,
    DataMessage,
    Hint,
    Message,
    Open,
    Result,
    Route,
    Segment,
    Send,
    Step,
    Timing,
)
from flowspec.model.kv_cache import SlotTable

NUM_GUESSES = 16  # tokens that a hint names for each row
PATIENCE_S = 0.002  # a forward is interrupted no more often, to look for commits
HINT_SHARE = 0.25  # of a forward's time; dearer hints keep the segments that follow waiting
_NUM_TRIALS = 3  # hints until it is known what one takes

Ints: TypeAlias = NDArray[np.int64]


class Cache(Protocol):
    """What one request has left on a stage, by slot."""

    slots: SlotTable


class Stage(Protocol):
    """What a worker runs: ``model.stage.Stage``, or what stands in for it."""

    is_first: bool
    is_last: bool

    def open_cache(self, root_id: int) -> Any:
        """An empty ``Cache`` of this stage's own kind."""
        ...

    def steps(self, inputs: Tensor, slots: NDArray[np.int64], cache: Any) -> Generator[Tensor | None]:
        """Rows that have slots -> their hidden states [rows, hidden size], after a ``None`` for each pause before."""
        ...


@dataclass
class _OpenRequest:
    epoch: int
    cache: Cache
    want_features: bool
    want_hints: bool
    step: int = 0  # the newest step of a lock-step schedule


@dataclass
class _Forward:
    """A segment's forward, as far as it has come."""

    segment: Segment
    rows: Ints  # of the segment, that are run
    request: _OpenRequest
    steps: Generator[Tensor | None]
    start_s: float


class Hinter(Protocol):
    """Guesses next tokens from what a worker passes on: ``model.hint_head.HintHead``, or what stands in for it."""

    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H] -> the ``k`` best tokens, best first, and their log-probabilities, both [n, k]."""
        ...


class Worker:
    """Runs one stage.

    ``on_message`` takes a message without working on it: a commit is applied at once, the data path queues. ``on_idle``
    works off one queued message, in pieces of ``PATIENCE_S``. So every commit that has arrived is applied before the
    next segment starts, a forward whose rows have all died stops between two layers, and nothing ever waits for a
    commit. A worker with a ``hinter`` tells the driver what it guesses of a segment, once that has been passed on.
    """

    def __init__(
        self,
        stage: Stage,
        index: int,
        clock: Callable[[], float],
        patience_s: float | None = PATIENCE_S,
        hinter: Hinter | None = None,
        hint_share: float = HINT_SHARE,
    ) -> None:
        """``patience_s``: a forward looks for commits after as long, between layers; ``None``: never.

        ``hint_share``: of a forward's time that a hint may take at most, or none is made.
        """
        self.link_bytes = 0  # received on the data path; the shell counts
        self._stage = stage
        self._index = index
        self._clock = clock
        self._patience_s = math.inf if patience_s is None else patience_s
        self._requests: dict[int, _OpenRequest] = {}
        self._queue: deque[DataMessage] = deque()
        self._hinter = hinter
        self._hint_share = hint_share
        self._hint_s: list[float] = []  # what the first ones took
        self._running: _Forward | None = None
        self._passed_on: Segment | None = None  # to be hinted at

    wake_s = math.inf  # a worker has work when a message has come, and only then

    def on_message(self, message: Message) -> list[Send]:
        """Raises ``ProtocolError`` for a message that contradicts what came before."""
        match message:
            case Commit(request_id=request_id):
                request = self._requests.get(request_id)
                # A finished request, or an older epoch of it: what the commit speaks of is gone.
                if request is not None and request.epoch == message.epoch:
                    request.cache.slots.commit(message.prefix_ids, message.root_id)
            case Step(request_id=request_id):
                request = self._requests.get(request_id)
                if request is not None and request.epoch == message.epoch:
                    request.step = max(request.step, message.number)
            case Open() | Segment() | Close():
                self._queue.append(message)
            case _:
                raise ProtocolError(f"a worker takes no {type(message).__name__} during a session")
        return []

    def on_idle(self) -> list[Send] | None:
        """Go on with the forward under way, else work off the oldest queued message that may run; ``None``: no work."""
        if self._running is not None:
            return self._go_on(self._running)
        if self._passed_on is not None and self._hinter is not None:
            segment, self._passed_on = self._passed_on, None
            return self._hint(segment, self._hinter)
        match self._next_message():
            case None:
                return None
            case Open() as message:
                cache = self._stage.open_cache(message.root_id)
                self._requests[message.request_id] = _OpenRequest(
                    message.epoch, cache, message.want_features, message.want_hints
                )
                return [] if self._stage.is_last else [Send(Route.NEXT, message)]
            case Close() as message:
                self._requests.pop(message.request_id, None)
                closed = Send(Route.DRIVER, Closed(message.request_id, message.epoch))
                return [closed] if self._stage.is_last else [Send(Route.NEXT, message)]
            case Segment() as message:
                return self._begin(message)

    def _next_message(self) -> DataMessage | None:
        """Take the oldest; a request whose oldest segment waits for a step lets the others' messages pass."""
        if self._queue and not self._is_gated(self._queue[0]):
            return self._queue.popleft()
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
        request = self._requests.get(segment.request_id)
        if request is None or request.epoch != segment.epoch:
            return []
        rows, slots = _place(segment, request.cache)
        if not len(rows) and segment.gate is None:
            return []
        if self._stage.is_first != (segment.token_ids is not None):
            raise ProtocolError("token ids belong on the first stage, hidden states on the others")
        inputs = torch.tensor(segment.token_ids) if segment.hidden is None else segment.hidden
        if len(rows) < len(segment.node_ids):
            inputs = inputs[torch.from_numpy(rows)]
        self._running = _Forward(segment, rows, request, self._stage.steps(inputs, slots, request.cache), self._clock())
        return self._go_on(self._running)

    def _go_on(self, forward: _Forward) -> list[Send]:
        """Run some layers, unless all rows have died meanwhile; pass the living rows on when it was the last one."""
        if not len(_living(forward)) and forward.segment.gate is None:
            forward.steps.close()
            self._running = None
            return []
        until_s = self._clock() + self._patience_s
        for hidden in forward.steps:
            if hidden is not None:
                self._running = None
                return self._pass_on(forward, hidden)
            if self._clock() >= until_s:
                return []
        raise AssertionError("a stage's last step has hidden states")

    def _pass_on(self, forward: _Forward, hidden: Tensor) -> list[Send]:
        segment, request = forward.segment, forward.request
        timing = Timing(self._index, len(forward.rows), forward.start_s, self._clock(), self.link_bytes)
        timings = [*segment.timings, timing]
        living = _living(forward)
        rows = forward.rows[living]
        if len(rows) < len(forward.rows):
            hidden = hidden[torch.from_numpy(living)]
        node_ids = [segment.node_ids[row] for row in rows]
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
            may_hint = request.want_hints and self._is_hint_cheap(timing.end_s - timing.start_s)
            if may_hint and passed_on.num_prefix < len(node_ids):
                self._passed_on = passed_on
            return [Send(Route.NEXT, passed_on)]
        if not request.want_features:
            node_ids, hidden = node_ids[segment.num_prefix :], hidden[segment.num_prefix :]
        result = Result(
            segment.request_id, segment.epoch, segment.segment_id, node_ids, segment.num_prefix, hidden, timings
        )
        return [Send(Route.DRIVER, result)]

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
        for request in self._requests.values():
            request.cache.slots.check_integrity()

    @property
    def num_open(self) -> int:
        """Requests that hold a cache here."""
        return len(self._requests)


def _living(forward: _Forward) -> Ints:
    """Which of the forward's rows are alive; prefix rows never die."""
    segment, slots = forward.segment, forward.request.cache.slots
    ids = segment.node_ids
    is_alive = [row < segment.num_prefix or slots.slot_of(ids[row]) is not None for row in forward.rows.tolist()]
    return np.flatnonzero(is_alive)


def _place(segment: Segment, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """Slots for the segment's living rows: (their indices, their slots)."""
    num_prefix = segment.num_prefix
    prefix_slots = cache.slots.append_prefix(segment.positions[:num_prefix])
    kept, slots = cache.slots.place(
        segment.node_ids[num_prefix:], segment.parent_ids[num_prefix:], segment.positions[num_prefix:]
    )
    return np.concatenate([np.arange(num_prefix), kept + num_prefix]), np.concatenate([prefix_slots, slots])
