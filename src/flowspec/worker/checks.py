"""What a worker takes: every field of a message is held against the stage and the request before memory is asked for.

Each check raises ``ProtocolError``. Whether a message contradicts what came before is partly for the slot table to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from flowspec.config import MAX_HEARTBEAT_S, MIN_HEARTBEAT_S
from flowspec.core import MAX_ROWS, MAX_RUNNING, TapShape
from flowspec.errors import ProtocolError, UsageError, require, shortened
from flowspec.model.stage import Stage
from flowspec.model.taps import Taps
from flowspec.wire.curve import is_key
from flowspec.wire.messages import (
    LAST_STEP,
    MAX_ID,
    NO_PARENT,
    Close,
    Commit,
    Configure,
    End,
    Open,
    Reserve,
    Segment,
    Step,
)
from flowspec.wire.transport import tcp_endpoint
from flowspec.worker.requests import OpenRequest, RequestMessage, Requests

if TYPE_CHECKING:
    from flowspec.model.loader import Checkpoint  # with it comes transformers, which simulations do without

_MAX_STAGES = 4096
_MAX_NAME_LEN = 4096  # as of a path
_MAX_TAPS, _MAX_WIDTH = 64, 2**16  # layers that a draft reads, and the width of its features
_MAX_BEST = 4096  # tokens that a draft model names for each row
_HOST_AND_PORT = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+(%\w+)?\]|[\w.-]+):\d{1,5}")


@dataclass(frozen=True)
class Limits:
    """Of a model: what its config allows. Without it, as of emulated stages, only what no model can have is refused."""

    vocab_size: int = 2**31
    num_positions: int = 2**31

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Limits:
        return cls(checkpoint.vocab_size, checkpoint.max_positions)

    @property
    def num_slots(self) -> int:
        """That one request can have use for: its text, and twice its tree."""
        return self.num_positions + MAX_ROWS + 1


class Checks:
    """Of one worker's stage."""

    def __init__(self, stage: Stage, index: int, limits: Limits, requests: Requests, taps: Taps | None = None) -> None:
        self._stage = stage
        self._taps = taps
        self._index = index
        self._limits = limits
        self._requests = requests

    def check(self, message: RequestMessage) -> None:
        """As soon as it arrives."""
        _check_id("request", message.request_id)
        _check_id("epoch", message.epoch)
        match message:
            case Segment():
                self._check_rows(message)
            case Open():
                _check_id("root", message.root_id)
                require(message.num_cached >= 0, f"{message.num_cached} tokens of a cache are wanted")
                self._check_slots(message.slot_limit)
                is_known = message.request_id in self._requests
                require(is_known or self._requests.num_open < MAX_RUNNING, f"{MAX_RUNNING} requests are open already")
            case Commit():
                require(0 < len(message.prefix_ids) <= MAX_ROWS, f"a commit of {len(message.prefix_ids)} nodes")
                _check_id("root", message.root_id)
            case Step():
                require(abs(message.number) <= LAST_STEP, f"there is no step {message.number}")
            case Reserve():
                self._check_slots(message.slot_limit)
            case End() | Close():
                pass

    def check_place(self, segment: Segment, request: OpenRequest) -> None:
        """Against what the request has, when the segment's turn has come."""
        table, has_features = request.cache.slots, segment.features is not None
        is_begun = request.want_taps and self._taps is not None and self._taps.is_begun
        require(has_features == is_begun, f"it {'has' if has_features else 'lacks'} features of the stages before")
        num_rows = len(segment.node_ids)
        require(table.num_nodes + num_rows <= MAX_ROWS, f"more than {MAX_ROWS} nodes are not committed")
        most = self._limits.num_slots
        require(table.num_used + num_rows <= most, f"the request holds more than the {most} slots of a text")
        for parent_id, position in zip(segment.parent_ids, segment.positions, strict=True):
            if (slot := table.slot_of(parent_id)) is not None and table.positions[slot] + 1 != position:
                raise ProtocolError(f"a node stands at position {position}, its parent at {table.positions[slot]}")

    def _check_slots(self, slot_limit: int) -> None:
        most = self._limits.num_slots
        require(0 <= slot_limit <= most, f"a cache of {slot_limit} slots is wanted; no text needs more than {most}")

    def _check_rows(self, segment: Segment) -> None:
        num_rows, stage, limits = len(segment.node_ids), self._stage, self._limits
        require(num_rows <= MAX_ROWS, f"a segment of {num_rows} rows; the most is {MAX_ROWS}")
        _check_id("segment", segment.segment_id)
        _check_range("node id", segment.node_ids, 0, MAX_ID)
        _check_range("parent id", segment.parent_ids, NO_PARENT, MAX_ID)
        _check_range("position", segment.positions, 0, limits.num_positions + MAX_ROWS)
        _check_prefix(segment)
        stages = [timing.stage for timing in segment.timings]
        require(stages == list(range(1, self._index)), f"its timings are of the stages {stages[:20]}")
        gate = segment.gate
        require(gate is None or abs(gate) < LAST_STEP, f"there is no step {gate}")
        require(stage.is_first == (segment.hidden is None), "token ids are for the first stage alone")
        if segment.token_ids is not None:
            _check_range("token", segment.token_ids, 0, limits.vocab_size)
        if (hidden := segment.hidden) is not None:
            fits = tuple(hidden.shape) == (num_rows, stage.hidden_size) and hidden.dtype == stage.dtype
            require(fits, f"hidden states are {hidden.dtype} {list(hidden.shape)}, not {stage.dtype} of width "
                     f"{stage.hidden_size}")  # fmt: skip
        if (features := segment.features) is not None:
            width = 0 if self._taps is None else self._taps.shape.width
            fits = tuple(features.shape) == (num_rows, width) and features.dtype == stage.dtype
            require(fits, f"features are {features.dtype} {list(features.shape)}, not {stage.dtype} of width {width}")


def _check_prefix(segment: Segment) -> None:
    """A chain; and in the tree, where a parent is in the same segment, its child is one position further."""
    positions = np.array(segment.positions, dtype=np.int64)
    steps = np.diff(positions[: segment.num_prefix])
    require(bool((steps == 1).all()), "the positions of a prompt do not follow each other")
    place = dict(zip(segment.node_ids, segment.positions, strict=True))
    for parent_id, position in zip(segment.parent_ids, segment.positions, strict=True):
        if parent_id in place and place[parent_id] + 1 != position:
            raise ProtocolError(f"a node stands at position {position}, its parent at {place[parent_id]}")


def check_configure(configure: Configure, endpoint: str) -> None:
    """``endpoint``: where this worker listens."""
    stage, heartbeat_s = configure.stage, configure.heartbeat_s
    require(1 <= stage <= _MAX_STAGES, f"there is no stage {stage}")
    require(MIN_HEARTBEAT_S <= heartbeat_s <= MAX_HEARTBEAT_S, f"a heartbeat of {heartbeat_s} s is none")
    start, end = configure.start_layer, configure.end_layer
    require(0 <= start < end < MAX_ID and (start == 0) == (stage == 1), f"stage {stage} has no layers {start}:{end}")
    if configure.taps is not None:
        _check_taps(configure.taps)
    is_alone = (stage, configure.next_address, configure.taps, configure.emulation) == (1, None, None, None)
    num_best = configure.num_best
    require(not num_best or (is_alone and 0 < num_best <= _MAX_BEST), f"no draft model names {num_best} tokens")
    for name in (configure.model, configure.hints):
        fits = name is None or (0 < len(name) <= _MAX_NAME_LEN and name.isprintable())
        require(fits, f"{shortened(name or '', 60)!r} is the name of no model")
    for key in (configure.next_key, configure.previous_key):
        require(key is None or is_key(key), "a worker's key is none")
    if configure.next_address is not None:
        _check_next_address(configure.next_address, endpoint)


def _check_taps(taps: TapShape) -> None:
    layers, eps = taps.layers, taps.norm_eps
    ascend = all(left < right for left, right in pairwise(layers))
    require(0 < len(layers) <= _MAX_TAPS and ascend and layers[0] >= 0, f"nobody reads the layers {layers[:20]}")
    require(0 < taps.num_outputs < taps.width + 1 <= _MAX_WIDTH, f"features of width {taps.width} are wanted")
    require(eps is None or 0 < eps < 1, f"a norm with {eps} is none")


def _check_next_address(address: str, endpoint: str) -> None:
    """Another worker's: over TCP, or beside this one's own socket where that is a file."""
    told = f"{shortened(address, 60)!r} is no address of a next worker"
    try:
        wanted = tcp_endpoint(address)
    except UsageError:
        raise ProtocolError(told) from None
    if wanted.startswith("ipc://"):
        path, own = (PurePosixPath(name.removeprefix("ipc://")) for name in (wanted, endpoint))
        fits = endpoint.startswith("ipc://") and path.parent == own.parent and path.name.isalnum()
    else:
        fits = bool(_HOST_AND_PORT.fullmatch(wanted)) and 0 < int(wanted.rpartition(":")[2]) < 2**16
    require(fits, told)
    require(wanted != endpoint, f"{address} is this worker's own address; give each worker's once")


def _check_id(kind: str, number: int) -> None:
    require(0 <= number < MAX_ID, f"there is no {kind} {number}")


def _check_range(kind: str, numbers: Sequence[int], least: int, end: int) -> None:
    if numbers and not least <= min(numbers) <= max(numbers) < end:
        wrong = next(number for number in numbers if not least <= number < end)
        raise ProtocolError(f"there is no {kind} {wrong}; they lie in {least}..{end - 1}")
