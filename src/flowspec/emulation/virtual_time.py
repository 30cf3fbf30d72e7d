"""Actors in virtual time: what happens when, given what work and messages cost. No sockets, no real time.

The simulator runs a whole cluster of places on one virtual clock; the emulator runs one place in each process and
sleeps until the wall clock has caught up. Both share this page, so they tell the same story.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeAlias

from torch import Tensor

from flowspec.emulation.costs import EmulatedModel, LinkModel
from flowspec.model.stage import Part, Stage, StageCache, Watch
from flowspec.request.records import Span
from flowspec.wire.actor import Actor, Send
from flowspec.wire.codec import Codec
from flowspec.wire.messages import Message, Result, Segment
from flowspec.worker.hints import Hinter

PAUSES = 3  # of an emulated forward, to look for commits; real ones pause after every layer


@dataclass
class Clock:
    """One place's time in seconds; whatever costs time moves it on. ``spans`` is what it was spent on."""

    now: float = 0.0
    spans: list[Span] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float, place: int, work: str, num_rows: int) -> None:
        start, self.now = self.now, self.now + seconds
        self.spans.append(Span(place, start, self.now, work, num_rows))

    def extend(self, seconds: float) -> None:
        """Go on with what the last span was spent on."""
        self.now += seconds
        self.spans[-1] = replace(self.spans[-1], end_s=self.now)

    def rename(self, work: str) -> None:
        """The last span was spent on something else."""
        self.spans[-1] = replace(self.spans[-1], work=work)

    def label(self, segment_id: int) -> None:
        """The work that has just ended was for that segment."""
        if self.spans and self.spans[-1].end_s == self.now and self.spans[-1].segment_id < 0:
            self.spans[-1] = replace(self.spans[-1], segment_id=segment_id)


class Place:
    """An actor with its inbox. It does one thing at a time: read a message that has arrived, else its own work."""

    def __init__(self, actor: Actor, clock: Clock) -> None:
        self.clock = clock
        self._actor = actor
        self._inbox: list[tuple[float, int, Message]] = []  # a heap by (arrival, order of delivery)
        self._num_delivered = 0
        self._may_work = False  # the actor has not said that it is idle since it last learned something

    def deliver(self, arrival_s: float, message: Message) -> None:
        heapq.heappush(self._inbox, (arrival_s, self._num_delivered, message))
        self._num_delivered += 1

    @property
    def next_s(self) -> float:
        """When it can do the next thing; infinite when it waits for a message that nobody has sent."""
        if self._may_work:
            return self.clock.now
        return max(self.clock.now, min(self._inbox[0][0] if self._inbox else math.inf, self._actor.wake_s))

    def run(self) -> list[Send]:
        """Do the next thing; the clock stands at its end, which is when what it sends leaves."""
        self.clock.now = self.next_s
        if self._inbox and self._inbox[0][0] <= self.clock.now:
            self._may_work = True
            return self._actor.on_message(heapq.heappop(self._inbox)[2])
        sends = self._actor.on_idle()
        self._may_work = sends is not None
        if sends and isinstance(sends[0].message, (Segment, Result)):
            self.clock.label(sends[0].message.segment_id)
        return sends or []

    def wake(self) -> None:
        """The caller has given the actor something to do."""
        self._may_work = True


# (rows, rows in the cache, time, layers that are read for a draft) -> seconds of a forward.
StageCost: TypeAlias = Callable[[int, int, float, int], float]


class EmulatedStage:
    """A stage that takes as long as emulated devices would."""

    def __init__(self, stage: Stage, index: int, clock: Clock, cost_s: StageCost, num_taps: int = 0) -> None:
        """``index``: the worker's, from 1. ``num_taps``: layers that are read for a draft, where somebody wants it."""
        self._stage = stage
        self._index = index
        self._clock = clock
        self._cost_s = cost_s
        self._num_taps = num_taps
        self.is_first, self.is_last = stage.is_first, stage.is_last
        self.hidden_size, self.dtype = stage.hidden_size, stage.dtype
        self.weights_bytes, self.slot_bytes = stage.weights_bytes, stage.slot_bytes

    def open_cache(self, root_id: int | None = None) -> StageCache:
        return self._stage.open_cache(root_id)

    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[Tensor | None]:
        """The emulated device pauses ``PAUSES`` times, evenly."""
        *_, hidden = self._stage.steps(parts, watch)
        num_rows = sum(len(part.slots) for part in parts)
        if num_rows:
            context_len = sum(part.cache.slots.high_water for part in parts)
            num_taps = 0 if watch is None else self._num_taps
            seconds = self._cost_s(num_rows, context_len, self._clock.now, num_taps)
            self._clock.spend(seconds / (PAUSES + 1), self._index, "forward", num_rows)
            for _ in range(PAUSES):
                try:
                    yield None
                except GeneratorExit:
                    self._clock.rename("cancelled forward")
                    raise
                self._clock.extend(seconds / (PAUSES + 1))
        yield hidden


class EmulatedHinter:
    """A hint head that takes as long as the emulated one would."""

    def __init__(self, hinter: Hinter, index: int, clock: Clock, seconds: float) -> None:
        self._hinter = hinter
        self._index = index
        self._clock = clock
        self._seconds = seconds

    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self._clock.spend(self._seconds, self._index, "hint", len(hidden))
        return self._hinter.guess(hidden, k)


class VirtualLink:
    """One direction of one connection: bytes take turns, messages keep their order."""

    def __init__(self, model: LinkModel, latency_s: float, random: Random, max_delay_s: float = 0.0) -> None:
        """``latency_s``: of the whole way; ``max_delay_s``: a fault, each message is late by up to this."""
        self.num_bytes = 0
        self._model = model
        self._random = random
        self._latency_s = latency_s
        self._max_delay_s = max_delay_s
        self._free_s = 0.0
        self._last_arrival_s = 0.0

    def arrival_s(self, sent_s: float, num_bytes: int) -> float:
        self.num_bytes += num_bytes
        model, random = self._model, self._random
        self._free_s = max(self._free_s, sent_s) + model.transfer_s(num_bytes)
        arrival_s = self._free_s + self._latency_s
        if model.jitter_ms or model.loss:
            arrival_s += model.extra_delay_s(num_bytes, random.random(), random.random())
        if self._max_delay_s:
            arrival_s += self._max_delay_s * random.random()
        self._last_arrival_s = max(self._last_arrival_s, arrival_s)
        return self._last_arrival_s


class Sizes:
    """Bytes of messages as the emulated model's would be: our headers, its hidden states."""

    def __init__(self, model: EmulatedModel) -> None:
        self._row_bytes = model.hidden_size * model.bytes_per_activation
        self._codec = Codec()

    def num_bytes(self, message: Message) -> int:
        header = len(self._codec.encode(message)[0])
        match message:
            case Segment(hidden=Tensor() as hidden) | Result(hidden=hidden):
                num_vectors = len(hidden) + (0 if message.features is None else len(message.features))
                return header + round(num_vectors * self._row_bytes)
            case _:
                return header
