"""The requests that are open on a worker, with their caches, and the prefix cache: caches that ended ones have left."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from flowspec.core import FINAL
from flowspec.errors import ProtocolError
from flowspec.model.stage import Stage, StageCache
from flowspec.wire.messages import Close, Commit, End, Forget, Open, Reserve, Segment, Step

_MAX_ENDED = 64  # requests and epochs

RequestMessage: TypeAlias = Open | Segment | Reserve | Close | Commit | End | Step  # of one epoch of a request


@dataclass
class OpenRequest:
    """One epoch of a request on this worker."""

    epoch: int
    cache: StageCache
    want_features: bool  # of prefix rows too
    want_taps: bool  # they are what the stages add up
    want_hints: bool
    step: int = 0  # the newest step of a lock-step schedule
    is_over: bool = False  # all of its rows are dead, whatever the cache says


class Requests:
    """Who holds a cache of the stage."""

    def __init__(self, stage: Stage, tapped: tuple[int, ...] = ()) -> None:
        """``tapped``: the layers of which the session's stages add up features."""
        self._stage = stage
        self._tapped = tapped
        self._open: dict[int, OpenRequest] = {}
        self._cached: dict[int, StageCache] = {}  # of requests that have ended
        self._ended: deque[tuple[int, int]] = deque(maxlen=_MAX_ENDED)  # whose ``End`` overtook their ``Open``, maybe

    def __contains__(self, request_id: int) -> bool:
        """Whether it is open, in whatever epoch."""
        return request_id in self._open

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def find(self, message: RequestMessage) -> OpenRequest | None:
        """Whom a message speaks of; ``None`` for a finished request, or another epoch of it."""
        request = self._open.get(message.request_id)
        return request if request is not None and request.epoch == message.epoch else None

    def control(self, message: Commit | End | Step) -> None:
        """Apply it at once. Raises ``ProtocolError`` for a commit that contradicts what came before."""
        request = self.find(message)
        if request is None:  # what the message speaks of is gone, or its ``Open`` is on its way
            if isinstance(message, End):
                self._ended.append((message.request_id, message.epoch))
            return
        match message:
            case End():
                request.is_over = True
            case Step():
                request.step = max(request.step, message.number)
            case Commit() if not request.is_over:
                request.cache.slots.commit(message.prefix_ids, message.root_id)
            case Commit():
                pass

    def open(self, message: Open) -> None:
        """Raises ``ProtocolError`` where the cache that it wants to take over is not there, or it is open already."""
        if (before := self._open.get(message.request_id)) is not None and before.epoch >= message.epoch:
            raise ProtocolError(f"request {message.request_id} is open already, in epoch {before.epoch}")
        wanted = tuple(message.feature_layers)
        want_taps = bool(wanted) and wanted == self._tapped
        if not want_taps and not {FINAL}.issuperset(wanted):
            raise ProtocolError(f"request {message.request_id} wants outputs of layers {message.feature_layers[:20]}")
        if message.cached_by is None:
            cache = self._stage.open_cache(message.root_id)
        elif message.cached_by in self._cached:
            cache = self._cached.pop(message.cached_by)
            cache.slots.reuse(message.num_cached, message.root_id)
        else:
            raise ProtocolError(
                f"request {message.request_id} wants the cache of {message.cached_by}, which is not kept"
            )
        cache.slots.limit = message.slot_limit
        is_over = (message.request_id, message.epoch) in self._ended
        self._open[message.request_id] = OpenRequest(
            message.epoch, cache, bool(wanted), want_taps, message.want_hints, is_over=is_over
        )

    def reserve(self, message: Reserve) -> None:
        if (request := self.find(message)) is not None:
            request.cache.slots.limit = message.slot_limit

    def close(self, message: Close) -> None:
        request = self._open.pop(message.request_id, None)
        if request is not None and message.cached_ids is not None:
            request.cache.slots.finish(message.cached_ids)
            self._cached[message.request_id] = request.cache
        if not self._open:
            self.check_integrity()  # now that nobody waits for anything

    def forget(self, message: Forget) -> None:
        self._cached.pop(message.request_id, None)

    def check_integrity(self) -> None:
        """Assert the invariants of all caches."""
        for cache in (*self._cached.values(), *(request.cache for request in self._open.values())):
            cache.slots.check_integrity()
