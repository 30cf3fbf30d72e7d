"""The messages between driver and workers, and their codec. Nobody's state, no sockets.

Segments run along the data path, driver -> worker 1 -> ... -> worker N, as do ``Open`` and ``Close``: a request's life
on a worker begins and ends in the order of its own rows, whatever the control connection does. Commits overtake the
data on the control connection, which is what makes them useful; they are correct whenever they arrive.

On the wire a message is one msgpack frame (a tagged array of its fields) and one raw frame for every tensor in it, in
the tensor's own dtype; or, where that is asked for, in int8 with a float32 scale for each row, which is not exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeAlias

import msgspec
import torch
from torch import Tensor

from flowspec.core import DType
from flowspec.errors import ProtocolError

PROTOCOL_VERSION = 5
NO_PARENT = -1  # the parent id of a request's first token
LAST_STEP = 2**62  # the step after which no segment of a request waits any more


class Timing(NamedTuple):
    """One stage's forward of one segment; seconds on that worker's own clock."""

    stage: int
    num_rows: int  # of the segment
    start_s: float
    end_s: float
    link_bytes: int  # bytes this worker has received on the data path since its session began
    num_shared: int  # rows of the whole forward, other requests' segments included


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages."""


# --- driver to every worker, on the control connection -------------------------------------------------------------


class Emulation(msgspec.Struct, frozen=True, array_like=True):
    """An emulated cluster: what a worker has to know to be as slow as the device that it plays."""

    cluster: str  # the cluster file's text
    hop_ms: float  # what the engine adds to each hop
    start_s: float  # when virtual time began, on the machine's monotonic clock
    time_scale: float  # wall clock seconds in a virtual second
    cancels: bool = True  # a forward whose rows have died stops


class Configure(Message, frozen=True):
    """Begins a session: load these layers and connect to the next worker (``None`` on the last one)."""

    version: int
    stage: int
    num_stages: int
    model: str
    start_layer: int
    end_layer: int
    dtype: DType
    next_address: str | None
    heartbeat_s: float
    emulation: Emulation | None = None
    hints: str | None = None  # the draft's directory, as the worker finds it, if hints are wanted
    int8_wire: bool = False  # hidden states go to the next worker in int8


class Commit(Message, frozen=True):
    """These nodes join the prefix, ``root_id`` is the new root; all that does not descend from it is dead.

    ``prefix_ids``: the old root, then the accepted nodes in path order. ``root_id`` may not have been sent yet.
    """

    request_id: int
    epoch: int
    prefix_ids: list[int]
    root_id: int


class End(Message, frozen=True):
    """A request, or this epoch of it, has ended: all of its rows are dead, those of its prompt too."""

    request_id: int
    epoch: int


class Step(Message, frozen=True):
    """Lock-step schedules: segments that wait for step ``number`` or an earlier one may run."""

    request_id: int
    epoch: int
    number: int


class Stop(Message, frozen=True):
    """Ends the session; the worker frees all its requests and waits for another driver."""


# --- along the data path -------------------------------------------------------------------------------------------


class Open(Message, frozen=True):
    """Begins a request, or a new epoch of it.

    ``want_features``: return hidden states of prefix rows too. ``want_hints``: workers that can send ``Hint``s.
    ``heir_of``: a request whose cache was kept; its first ``num_kept`` tokens are this one's too.
    ``num_slots``: that the cache may grow to, until ``Reserve`` allows more; 0: unknown.
    """

    request_id: int
    epoch: int
    root_id: int
    want_features: bool
    want_hints: bool = False
    heir_of: int | None = None
    num_kept: int = 0
    num_slots: int = 0


class Segment(Message, frozen=True):
    """Nodes that go through the pipeline together; parents come before children.

    The first ``num_prefix`` rows are prefix tokens, committed on arrival (prefill). Worker 1 gets ``token_ids``, the
    others ``hidden`` [rows, hidden size]. No mask travels: it follows from the parent ids.

    ``gate`` is the barrier of lock-step schedules: worker 1 runs the segment once ``Step`` ``gate`` has arrived, each
    next worker one step later, and a segment with no row left still travels, for the beat. ``None``: nobody waits.
    """

    request_id: int
    epoch: int
    segment_id: int
    node_ids: list[int]
    parent_ids: list[int]
    positions: list[int]
    num_prefix: int
    token_ids: list[int] | None
    hidden: Tensor | None
    timings: list[Timing]
    gate: int | None = None

    def __post_init__(self) -> None:
        num_rows = len(self.node_ids)
        if not num_rows == len(self.parent_ids) == len(self.positions) or not 0 <= self.num_prefix <= num_rows:
            raise ValueError("segment: node, parent and position lists differ in length")
        if any(left >= right for left, right in pairwise(self.node_ids)):
            raise ValueError("segment: node ids must grow")
        if any(parent >= node for parent, node in zip(self.parent_ids, self.node_ids, strict=True)):
            raise ValueError("segment: a parent id must be below its child's")
        if (self.token_ids is None) == (self.hidden is None):
            raise ValueError("segment: exactly one of token ids and hidden states is needed")
        rows = self.token_ids if self.token_ids is not None else self.hidden
        if rows is not None and len(rows) != num_rows:
            raise ValueError(f"segment: {len(rows)} inputs for {num_rows} nodes")


class Reserve(Message, frozen=True):
    """The request's cache may grow to ``num_slots`` in all; see ``Open``."""

    request_id: int
    epoch: int
    num_slots: int


class Close(Message, frozen=True):
    """Frees what a request holds on every worker it passes.

    ``kept_ids``: the nodes that were accepted, in path order, if the cache is to stay for an heir. Commits of them may
    still be on their way, and will find nobody.
    """

    request_id: int
    epoch: int
    kept_ids: list[int] | None = None


class Forget(Message, frozen=True):
    """Drops the cache that an ended request has left."""

    request_id: int


class Probe(Message, frozen=True):
    """An ``Echo`` tells how long it took. From a worker to the next at start-up, and from the driver now and then."""

    number: int
    payload: bytes


# --- worker to driver ----------------------------------------------------------------------------------------------


class Loading(Message, frozen=True):
    """A worker is busy reading its weights; ``fraction`` is done."""

    stage: int
    fraction: float


class Ready(Message, frozen=True):
    """A worker has loaded its stage and is connected to the next one; what segments cost there, unless emulated."""

    stage: int
    weight_bytes: int
    peak_memory_bytes: int
    forward_s: list[tuple[int, float]] = []  # (rows, seconds) by growing rows
    link_bytes_per_s: float | None = None  # to the next worker; ``None``: unknown, or the last one
    link_latency_s: float | None = None  # one way
    slot_bytes: int = 0  # of one row's keys and values in all layers of the stage
    free_bytes: int = 0  # of the device's memory, once the weights are loaded; 0: unknown


class Result(Message, frozen=True):
    """The final hidden states [rows, hidden size] of a segment's rows that are still alive, from the last worker."""

    request_id: int
    epoch: int
    segment_id: int
    node_ids: list[int]
    num_prefix: int
    hidden: Tensor
    timings: list[Timing]

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2 or len(self.hidden) != len(self.node_ids):
            raise ValueError(f"result: hidden states {tuple(self.hidden.shape)} for {len(self.node_ids)} nodes")


class Hint(Message, frozen=True):
    """What a worker in the middle guesses of the tokens after some rows that are still on their way; it only steers.

    For each node its most probable next tokens, best first, with their log-probabilities.
    """

    request_id: int
    epoch: int
    node_ids: list[int]
    token_ids: list[list[int]]
    logprobs: list[list[float]]

    def __post_init__(self) -> None:
        widths = {len(guesses) for guesses in (*self.token_ids, *self.logprobs)}
        if not len(self.node_ids) == len(self.token_ids) == len(self.logprobs) or len(widths) > 1:
            raise ValueError("hint: node, token and log-probability lists differ in length")


class Broken(Message, frozen=True):
    """Hidden states that a worker passes on are not finite; whether any of these nodes counts is not known there."""

    request_id: int
    epoch: int
    stage: int
    layers: str  # of the stage, as ``4:8``
    node_ids: list[int]


class Failed(Message, frozen=True):
    """A worker cannot go on with this request, of which it drops all that comes; it goes on with others."""

    request_id: int
    epoch: int
    stage: int
    text: str
    traceback: str


class Closed(Message, frozen=True):
    """A ``Close`` has passed the last worker: nothing of the request is left in the pipeline."""

    request_id: int
    epoch: int


class Alive(Message, frozen=True):
    """The worker lives; it also tells the worker whether the driver does."""

    stage: int


class Busy(Message, frozen=True):
    """Refuses a ``Configure``: another driver uses this worker."""

    reason: str


class Failure(Message, frozen=True):
    """A worker cannot go on with this session. ``user_error``: the user's mistake, not a crash."""

    stage: int
    kind: str
    text: str
    traceback: str
    user_error: bool


class Echo(Message, frozen=True):
    """Answers a ``Probe``, on the same connection: to the worker before, or to the driver."""

    number: int
    clock_s: float = 0.0  # the worker's, whose zero is its own


class Stamped(Message, frozen=True):
    """A message of an emulated cluster, with the virtual time at which it arrives.

    ``lag_s``: the largest lag of the wall clock behind virtual time at the sender and at all who were before it.
    """

    arrival_s: float
    lag_s: float
    message: Commit | End | Step | Open | Segment | Reserve | Close | Forget | Hint | Broken | Result | Failed | Closed


DataMessage: TypeAlias = Open | Segment | Reserve | Close | Forget
ToWorker: TypeAlias = (
    Configure | Commit | End | Step | Stop | Open | Segment | Reserve | Close | Forget | Probe | Stamped
)
ToDriver: TypeAlias = (
    Loading | Ready | Hint | Broken | Result | Failed | Closed | Alive | Busy | Failure | Echo | Stamped
)


class Route(Enum):
    """Where an actor's message goes."""

    NEXT = "next"  # along the data path, to the next worker
    WORKERS = "workers"  # from the driver to every worker, on the control connections
    DRIVER = "driver"  # from a worker to the driver


@dataclass(frozen=True)
class Send:
    """What an actor wants done: it holds no socket."""

    route: Route
    message: Message


class Codec:
    """Messages to frames and back. Not thread-safe; one for each socket."""

    _DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int64": torch.int64,  # the hidden states of the synthetic language
    }
    _NAMES: ClassVar[dict[torch.dtype, str]] = {dtype: name for name, dtype in _DTYPES.items()}

    def __init__(self, int8_wire: bool = False) -> None:
        """``int8_wire``: encode float tensors [rows, n] in int8; whatever decodes them need not know."""
        self._int8_wire = int8_wire
        self._buffers: list[Any] = []
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._encode_tensor)
        self._to_worker = msgspec.msgpack.Decoder(ToWorker, dec_hook=self._decode_tensor)
        self._to_driver = msgspec.msgpack.Decoder(ToDriver, dec_hook=self._decode_tensor)

    def encode(self, message: Message) -> list[Any]:
        """The message's frames: header first, then a zero-copy view of each tensor."""
        self._buffers = []
        header = self._encoder.encode(message)
        return [header, *self._buffers]

    def decode_to_worker(self, frames: Sequence[Any]) -> ToWorker:
        """Raises ``ProtocolError`` for anything but one well-formed message to a worker."""
        return self._decode(self._to_worker, frames)

    def decode_to_driver(self, frames: Sequence[Any]) -> ToDriver:
        """Raises ``ProtocolError`` for anything but one well-formed message to the driver."""
        return self._decode(self._to_driver, frames)

    def _decode(self, decoder: msgspec.msgpack.Decoder[Any], frames: Sequence[Any]) -> Any:
        if not frames:
            raise ProtocolError("an empty message; is the peer a flowspec process of this version?")
        self._buffers = list(frames[1:])
        try:
            message = decoder.decode(frames[0])
        except (msgspec.DecodeError, ValueError, RuntimeError) as error:
            raise ProtocolError(f"not a flowspec message ({error}); is the peer of this version?") from None
        finally:
            num_left, self._buffers = len(self._buffers), []
        if num_left:
            raise ProtocolError(f"{num_left} frames too many in a {type(message).__name__} message")
        return message

    def _encode_tensor(self, value: object) -> object:
        assert isinstance(value, Tensor), f"no wire form for {type(value).__name__}"
        rows = value.detach().to("cpu").contiguous()
        name, shape = self._NAMES[rows.dtype], tuple(rows.shape)
        if self._int8_wire and rows.is_floating_point() and rows.ndim == 2:
            name, rows = _INT8 + name, _to_int8(rows)
        self._buffers.append(rows.reshape(-1).view(torch.uint8).numpy().data if rows.numel() else b"")
        return name, shape

    def _decode_tensor(self, kind: type, value: Any) -> object:
        assert kind is Tensor, f"no wire form for {kind.__name__}"
        name, shape = value
        is_int8 = isinstance(name, str) and name.startswith(_INT8)
        dtype = self._DTYPES.get(name.removeprefix(_INT8) if is_int8 else name)
        if dtype is None or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"tensor of unknown type {name!r} or shape {shape!r}")
        if is_int8:
            num_rows, num_columns = shape
            return _from_int8(self._read_tensor((num_rows, num_columns + _SCALE_BYTES), torch.int8)).to(dtype)
        return self._read_tensor(tuple(shape), dtype)

    def _read_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._buffers:
            raise ValueError("a tensor's frame is missing")
        buffer = memoryview(self._buffers.pop(0)).cast("B")
        if len(buffer) != prod(shape) * dtype.itemsize:
            raise ValueError(f"a tensor's frame has {len(buffer)} bytes, not the {prod(shape) * dtype.itemsize} stated")
        if not len(buffer):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


_INT8 = "int8/"  # before the name of the dtype that was quantised
_SCALE_BYTES = 4


def _to_int8(rows: Tensor) -> Tensor:
    """Float rows [n, k] as int8 [n, k + 4]: the values, at most half a scale off, and the bytes of the row's scale."""
    values = rows.float()
    scales = values.abs().amax(dim=1, keepdim=True) / 127 if rows.numel() else values.new_zeros(len(rows), 1)
    values = (values / torch.where(scales > 0, scales, 1)).round().to(torch.int8)
    return torch.cat([values, scales.view(torch.int8)], dim=1)


def _from_int8(packed: Tensor) -> Tensor:
    """float32 [n, k] from [n, k + 4]."""
    scales = packed[:, -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return packed[:, :-_SCALE_BYTES].float() * scales
