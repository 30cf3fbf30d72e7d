"""What one request has to tell the workers, message by message, until the driver sends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flowspec.request.prefix_cache import CachedPrefix
from flowspec.wire.actor import Route, Send
from flowspec.wire.messages import LAST_STEP, Close, Commit, End, Open, Reserve, Segment, Step


class Outbox:
    """Messages of one epoch of a request, in order."""

    def __init__(self, request_id: int, epoch: int, first_segment_id: int) -> None:
        self.next_segment_id = first_segment_id
        self._request_id = request_id
        self._epoch = epoch
        self._sends: list[Send] = []
        self._has_gates = False

    def __iter__(self) -> Iterator[Send]:
        return iter(self._sends)

    def take(self) -> list[Send]:
        """All of them, to be sent now."""
        sends, self._sends = self._sends, []
        return sends

    def _post(self, route: Route, message: Open | Segment | Reserve | Commit | End | Step | Close) -> None:
        self._sends.append(Send(route, message))

    def open(
        self, root_id: int, feature_layers: Sequence[int], want_hints: bool, cached: CachedPrefix, slot_limit: int
    ) -> None:
        """Begin at every worker."""
        message = Open(
            self._request_id,
            self._epoch,
            root_id,
            list(feature_layers),
            want_hints,
            cached.request_id,
            cached.num_cached,
            slot_limit,
        )
        self._post(Route.NEXT, message)

    def segment(
        self,
        node_ids: list[int],
        parent_ids: list[int],
        positions: list[int],
        token_ids: list[int],
        num_prefix: int,
        gate: int | None,
    ) -> int:
        """Send rows along the pipeline; see ``messages.Segment``. Returns the segment's id."""
        segment_id = self.next_segment_id
        message = Segment(
            self._request_id,
            self._epoch,
            segment_id,
            node_ids,
            parent_ids,
            positions,
            num_prefix,
            token_ids=token_ids,
            hidden=None,
            timings=[],
            gate=gate,
        )
        self._has_gates |= gate is not None
        self.next_segment_id += 1
        self._post(Route.NEXT, message)
        return segment_id

    def step(self, number: int) -> None:
        self._post(Route.WORKERS, Step(self._request_id, self._epoch, number))

    def reserve(self, slot_limit: int) -> None:
        self._post(Route.NEXT, Reserve(self._request_id, self._epoch, slot_limit))

    def commit(self, prefix_ids: list[int], root_id: int) -> None:
        self._post(Route.WORKERS, Commit(self._request_id, self._epoch, prefix_ids, root_id))

    def end(self, cached_ids: list[int] | None) -> None:
        """All that is in flight is dead, and ``Close`` follows it through the pipeline."""
        self._post(Route.WORKERS, End(self._request_id, self._epoch))
        if self._has_gates:
            self.step(LAST_STEP)
        self._post(Route.NEXT, Close(self._request_id, self._epoch, cached_ids))
