"""The worker: one stage and the caches of its requests. An actor without sockets, clock or threads of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from flowspec.errors import ProtocolError
from flowspec.messages import (
    Close,
    Closed,
    Commit,
    DataMessage,
    Message,
    Open,
    Result,
    Route,
    Segment,
    Send,
    Timing,
)
from flowspec.model.kv_cache import KVCache
from flowspec.model.stage import Stage


@dataclass
class _OpenRequest:
    epoch: int
    cache: KVCache
    want_features: bool


class Worker:
    """Runs one stage.

    ``on_message`` takes a message without working on it: a commit is applied at once, the data path queues. ``on_idle``
    works off one queued message. So every commit that has arrived is applied before the next segment starts, and
    nothing ever waits for one.
    """

    def __init__(self, stage: Stage, index: int, clock: Callable[[], float]) -> None:
        self.link_bytes = 0  # received on the data path; the shell counts
        self._stage = stage
        self._index = index
        self._clock = clock
        self._requests: dict[int, _OpenRequest] = {}
        self._queue: deque[DataMessage] = deque()

    def on_message(self, message: Message) -> list[Send]:
        """Raises ``ProtocolError`` for a message that contradicts what came before."""
        match message:
            case Commit(request_id=request_id):
                request = self._requests.get(request_id)
                # A finished request, or an older epoch of it: what the commit speaks of is gone.
                if request is not None and request.epoch == message.epoch:
                    request.cache.slots.commit(message.prefix_ids, message.root_id)
            case Open() | Segment() | Close():
                self._queue.append(message)
            case _:
                raise ProtocolError(f"a worker takes no {type(message).__name__} during a session")
        return []

    def on_idle(self) -> list[Send] | None:
        """Work off the oldest queued message; ``None`` when there is none."""
        if not self._queue:
            return None
        match self._queue.popleft():
            case Open() as message:
                cache = self._stage.open_cache(message.root_id)
                self._requests[message.request_id] = _OpenRequest(message.epoch, cache, message.want_features)
                return [] if self._stage.is_last else [Send(Route.NEXT, message)]
            case Close() as message:
                self._requests.pop(message.request_id, None)
                closed = Send(Route.DRIVER, Closed(message.request_id, message.epoch))
                return [closed] if self._stage.is_last else [Send(Route.NEXT, message)]
            case Segment() as message:
                return self._forward(message)

    def _forward(self, segment: Segment) -> list[Send]:
        """Run the rows that are alive and pass them on; a segment with none is dropped without a word."""
        request = self._requests.get(segment.request_id)
        if request is None or request.epoch != segment.epoch:
            return []
        rows, slots = _place(segment, request.cache)
        if not len(rows):
            return []
        start_s = self._clock()
        if self._stage.is_first != (segment.token_ids is not None):
            raise ProtocolError("token ids belong on the first stage, hidden states on the others")
        inputs = torch.tensor(segment.token_ids) if segment.hidden is None else segment.hidden
        if len(rows) < len(segment.node_ids):
            inputs = inputs[torch.from_numpy(rows)]
        hidden = self._stage.forward(inputs, slots, request.cache)
        timing = Timing(self._index, len(rows), start_s, self._clock(), self.link_bytes)
        timings = [*segment.timings, timing]
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
            )
            return [Send(Route.NEXT, passed_on)]
        if not request.want_features:
            node_ids, hidden = node_ids[segment.num_prefix :], hidden[segment.num_prefix :]
        result = Result(
            segment.request_id, segment.epoch, segment.segment_id, node_ids, segment.num_prefix, hidden, timings
        )
        return [Send(Route.DRIVER, result)]

    def check_integrity(self) -> None:
        """Assert the invariants of all caches."""
        for request in self._requests.values():
            request.cache.slots.check_integrity()

    @property
    def num_open(self) -> int:
        """Requests that hold a cache here."""
        return len(self._requests)


def _place(segment: Segment, cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Slots for the segment's living rows: (their indices, their slots)."""
    num_prefix = segment.num_prefix
    prefix_slots = cache.slots.append_prefix(segment.positions[:num_prefix])
    kept, slots = cache.slots.place(
        segment.node_ids[num_prefix:], segment.parent_ids[num_prefix:], segment.positions[num_prefix:]
    )
    return np.concatenate([np.arange(num_prefix), kept + num_prefix]), np.concatenate([prefix_slots, slots])
