"""The messages between driver and workers, by receiver. Nobody's state, no sockets.

Segments run along the data path, driver -> worker 1 -> ... -> worker N, as do ``Open`` and ``Close``: a request's life
on a worker begins and ends in the order of its own rows, whatever the control connection does. Commits overtake the
data on the control connection, which is what makes them useful; they are correct whenever they arrive.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypeAlias

import msgspec
from torch import Tensor

from flowspec.core import DType, StageManifest, TapShape, Weights

PROTOCOL_VERSION = 12
NO_PARENT = -1  # the parent id of a request's first token
LOADED = 1.0  # the fraction of a stage that is all of it
LAST_STEP = 2**62  # the step after which no segment of a request waits any more
MAX_ID = 2**62  # ids, epochs and the like are below
CHUNK_BYTES = 2**19  # of a tensor's bytes in one message: heartbeats find a way between them, on a slow link too


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
    model: str
    start_layer: int
    end_layer: int
    dtype: DType
    next_address: str | None
    heartbeat_s: float
    emulation: Emulation | None = None
    hints: str | None = None  # the draft's directory, as the worker finds it, if hints are wanted
    int8_wire: bool = False  # hidden states go to the next worker in int8
    weights: Weights = "float"  # of linear layers; never ``auto``
    taps: TapShape | None = None  # what all stages add up for the draft; ``TapBlock``s of this one's layers follow
    next_key: str | None = None  # by which the next worker proves itself, where both have joined a cluster
    previous_key: str | None = None  # of the worker that will connect to this one
    num_best: int = 0  # of a draft model's only stage: it has the lm_head, and answers with so many ``Guesses`` a row


class TapBlock(Message, frozen=True):
    """Rows of the matrix [``TapShape.num_outputs``, hidden size] by which the stream that enters a layer is multiplied.

    They come in order, in the stage's dtype, once the worker has said that it is ``Loading``; it is ready when it has
    all rows of all of its layers.
    """

    layer: int
    first_row: int
    weight: Tensor  # [rows, hidden size]


class Manifest(Message, frozen=True):
    """Answers ``WantManifest``."""

    stage: StageManifest


class Chunk(Message, frozen=True):
    """Answers ``WantChunk``: ``CHUNK_BYTES`` of what is stored, or what is left of it."""

    tensor: int  # its place among ``StageManifest.wanted``
    offset: int
    data: bytes


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

    ``feature_layers``: of the target, that the draft reads, of prefix rows too: ``FINAL`` alone, those of
    ``Configure.taps``, or none.
    ``want_hints``: of workers that can send ``Hint``s.
    ``cached_by``: an ended request whose cache this one takes over; its first ``num_cached`` tokens are this one's too.
    ``slot_limit``: that the cache may grow to, until ``Reserve`` allows more; 0: unknown.
    """

    request_id: int
    epoch: int
    root_id: int
    feature_layers: list[int]
    want_hints: bool = False
    cached_by: int | None = None
    num_cached: int = 0
    slot_limit: int = 0


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
    features: Tensor | None = None  # [rows, width of the taps], as far as they are added up; ``None``: nothing yet

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
        if self.features is not None and len(self.features) != num_rows:
            raise ValueError(f"segment: {len(self.features)} features for {num_rows} nodes")


class Reserve(Message, frozen=True):
    """The request's cache may grow to ``slot_limit`` in all; see ``Open``."""

    request_id: int
    epoch: int
    slot_limit: int


class Close(Message, frozen=True):
    """Frees what a request holds on every worker it passes.

    ``cached_ids``: the nodes that were accepted, in path order, if the cache is to stay for others. Commits of them may
    still be on their way, and will find nobody.
    """

    request_id: int
    epoch: int
    cached_ids: list[int] | None = None


class Forget(Message, frozen=True):
    """Drops the cache of an ended request."""

    request_id: int


class Probe(Message, frozen=True):
    """An ``Echo`` tells how long it took. From a worker to the next at start-up, and from the driver now and then."""

    number: int
    payload: bytes


# --- worker to driver ----------------------------------------------------------------------------------------------


class WantManifest(Message, frozen=True):
    """The worker has not the model that it is configured for: it asks of what its stage is made."""


class WantChunk(Message, frozen=True):
    """A part of a stored tensor; they are asked for, and come, in the order of tensors and offsets."""

    tensor: int  # its place among ``StageManifest.wanted``
    offset: int  # in bytes


class Fetching(Message, frozen=True):
    """How much has come of what the worker had to ask for; ``Loading`` follows."""

    num_bytes: int
    num_wanted: int  # bytes in all


class Loading(Message, frozen=True):
    """A worker is busy reading its weights; ``fraction`` is done. 0 as soon as it has them, 1 when all is loaded."""

    fraction: float


class Ready(Message, frozen=True):
    """A worker has loaded its stage and is connected to the next one; what segments cost there, unless emulated."""

    stage: int
    weight_bytes: int
    peak_memory_bytes: int
    forward_s: list[tuple[int, float]] = []  # (rows, seconds) by growing rows
    link_bytes_per_s: float | None = None  # to the next worker; ``None``: unknown, or the last one
    slot_bytes: int = 0  # of one row's keys and values in all layers of the stage
    free_bytes: int = 0  # of the device's memory, once the weights are loaded; 0: unknown
    fingerprint: str = ""  # of the stage's weights, as the worker's files hold them; empty: unknown
    load_s: float = 0.0  # from ``Configure`` on
    fetched_bytes: int = 0  # of weights, that came from the driver meanwhile


class Result(Message, frozen=True):
    """The final hidden states [rows, hidden size] of a segment's rows that are still alive, from the last worker.

    With ``features`` [rows, width of the taps], prefix rows have these alone: nobody asks for their hidden states.
    """

    request_id: int
    epoch: int
    segment_id: int
    node_ids: list[int]
    num_prefix: int
    hidden: Tensor
    timings: list[Timing]
    features: Tensor | None = None

    def __post_init__(self) -> None:
        num_rows = len(self.node_ids)
        num_hidden = num_rows if self.features is None else max(0, num_rows - self.num_prefix)
        if self.hidden.ndim != 2 or len(self.hidden) != num_hidden:
            raise ValueError(f"result: hidden states {tuple(self.hidden.shape)} for {num_hidden} nodes")
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != num_rows):
            raise ValueError(f"result: features {tuple(self.features.shape)} for {num_rows} nodes")


class Guesses(Message, frozen=True):
    """A draft model's answer, in place of a ``Result``: what may follow the rows behind the prefix, best first."""

    request_id: int
    epoch: int
    node_ids: list[int]
    token_ids: Tensor  # [rows, k], int32
    logprobs: Tensor  # [rows, k], float32

    def __post_init__(self) -> None:
        num_rows, shape = len(self.node_ids), self.token_ids.shape
        if len(shape) != 2 or shape[0] != num_rows or shape != self.logprobs.shape:
            raise ValueError("guesses: node, token and log-probability rows differ in number")


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


class Busy(Message, frozen=True):
    """Refuses a ``Configure``: another driver uses this worker."""

    reason: str


class Failure(Message, frozen=True):
    """A worker cannot go on with this session.

    ``user_error``: it is no crash. ``lost_next``: the next worker is gone. ``does_not_fit``: its memory is too small.
    """

    text: str
    traceback: str
    user_error: bool
    lost_next: bool = False
    does_not_fit: bool = False


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
ForLoading: TypeAlias = Manifest | Chunk | TapBlock
WhileLoading: TypeAlias = WantManifest | WantChunk | Fetching | Loading | Ready
ToWorker: TypeAlias = Configure | ForLoading | Commit | End | Step | Stop | DataMessage | Probe | Stamped
OfRequest: TypeAlias = Hint | Broken | Result | Guesses | Failed | Closed
ToDriver: TypeAlias = WhileLoading | OfRequest | Alive | Busy | Failure | Echo | Stamped
