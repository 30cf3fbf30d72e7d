"""A worker that holds a small model as draft: brought up, listened to, given up when it is lost, and awaited then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from flowspec.cluster.connections import Connections, LoadProgress, RemoteConnections
from flowspec.config import EngineConfig, LinkConfig
from flowspec.core import DraftDType, DType, Partition, Weights
from flowspec.draft.catalogue import ChosenDraft
from flowspec.draft.remote_passes import NUM_BEST, RemoteModelSource
from flowspec.draft.worker_slots import WorkerSlots
from flowspec.engine.pipeline import Pipeline, PipelineSpec, connect, open_pipeline
from flowspec.engine.telemetry import DraftState, DraftWorkerStatus
from flowspec.errors import DoesNotFitError, FlowspecError, UsageError, WorkerError
from flowspec.model.backends import weights_to_try
from flowspec.model.loader import Checkpoint
from flowspec.wire.actor import Route, Send
from flowspec.wire.messages import Closed, Commit, DataMessage, Failed, Guesses, Segment, ToDriver
from flowspec.wire.transport import tcp_endpoint

logger = logging.getLogger("flowspec.draft")

MAX_LOSSES = 3  # after so many it is not awaited any more
STEADY_S = 30.0  # one that was there for so long is no part of a crash loop
_RETRY_S = 5.0  # between two attempts at a new session


class DraftSession:
    """A ``draft.remote_passes.Port``; once it is lost it stays so."""

    def __init__(self, connections: RemoteConnections, stall_timeout_s: float) -> None:
        self.connections = connections
        self.problem: FlowspecError | None = None  # why it is lost
        self.source: RemoteModelSource | None = None  # that what comes is for
        self._stall_timeout_s = stall_timeout_s
        self._owed_s: dict[int, float] = {}  # by requests that wait for an answer, or whose end does: since when
        self._heard_s = 0.0  # when it last said something of any

    @property
    def is_lost(self) -> bool:
        return self.problem is not None or self.connections.is_over

    def send(self, message: DataMessage | Commit) -> None:
        if isinstance(message, Segment) and message.num_prefix < len(message.node_ids):
            self._owed_s.setdefault(message.request_id, time.monotonic())
        self.connections.send([Send(Route.NEXT, message)])

    def wait(self, timeout_s: float) -> None:
        """As ``Port.wait``. A worker that is gone, hangs, or says what it may not, is lost."""
        if self.is_lost or self.source is None:
            return
        try:
            for message in self.connections.receive(timeout_s):
                self._note(message)
                self.source.take(message)
            if self._silent_s > self._stall_timeout_s:
                raise WorkerError(f"the draft worker has answered nothing for {self._stall_timeout_s:.0f} s")
        except FlowspecError as error:
            self.problem = error

    def _note(self, message: ToDriver) -> None:
        if not isinstance(message, Guesses | Failed | Closed):
            return
        self._heard_s = time.monotonic()
        if not isinstance(message, Guesses) or message.node_ids:  # an empty one says how far it has read
            self._owed_s.pop(message.request_id, None)

    @property
    def _silent_s(self) -> float:
        """For how long it has said nothing, though it owes an answer."""
        return time.monotonic() - max(self._heard_s, min(self._owed_s.values())) if self._owed_s else 0.0


class DraftWorker:
    """A pipeline of one stage that has the lm_head too, from one session to the next."""

    def __init__(self, pipeline: Pipeline, config: EngineConfig, narrower: Sequence[Weights] = ()) -> None:
        """Use ``open_draft_worker`` to make one. ``config``: how much of its memory is for keys and values.

        ``narrower``: weights that are taken in turn where the model does not fit.
        """
        self._pipeline, self._config, self._narrower = pipeline, config, list(narrower)
        self._heard: RemoteConnections | None = None  # whose ``receive`` returns when something comes from here
        self._attempt: RemoteConnections | None = None  # at a session after a lost one
        self._num_losses = 0
        self._since_s = time.monotonic()  # when the newest session began
        self._lost_s: float | None = None  # since when it is lost
        self._next_s = 0.0  # when the next attempt begins
        self._bytes_before = 0  # of sessions that are over
        self._told = ""  # why it could not be used again, the newest reason that somebody can mend
        self._is_closed = False
        self.on_change: Callable[[RemoteModelSource | None], None] = lambda source: None  # ``None``: it is lost
        self.session = DraftSession(_remote(pipeline), pipeline.spec.link.stall_timeout_s)

    @property
    def status(self) -> DraftWorkerStatus:
        """Any thread may ask."""
        state: DraftState = "away" if self.session.is_lost else "up"
        if self._is_closed and self.session.problem is None:
            state = "off"
        slots = WorkerSlots() if self.session.source is None else self.session.source.slots
        return DraftWorkerStatus(self._pipeline.addresses[0], state, self.link_bytes, slots.num_slots, slots.num_held)

    @property
    def link_bytes(self) -> int:
        """Bytes that have gone to it and come back, in all sessions."""
        return self._bytes_before + self.session.connections.link_bytes

    def await_ready(self, source: RemoteModelSource, progress: LoadProgress) -> None:
        """Until it has loaded the model; what comes then is for ``source``.

        Raises ``WorkerError``, and ``UsageError`` for what the user can mend.
        """
        while True:
            try:
                self._pipeline.await_ready(progress)
                break
            except UsageError as error:
                told = f"draft worker {self._pipeline.addresses[0]}: {error}"
                if not (self._narrower and isinstance(error, DoesNotFitError)):
                    raise UsageError(told) from None
                smaller = self._narrower.pop(0)
                logger.warning("%s; as --draft-dtype is auto, its weights are to be %s", told, smaller)
                self._pipeline.close()
                self._pipeline = open_pipeline(replace(self._pipeline.spec, weights=smaller))
                self.session.connections = _remote(self._pipeline)
        source.slots.num_slots = self._num_slots(self._pipeline)
        self.session.source = source

    def _num_slots(self, pipeline: Pipeline) -> int | None:
        """That its caches have room for, by its memory, and where people say how many, by that too."""
        by_memory = pipeline.num_slots(replace(self._config, kv_slots=0))
        return min((num for num in (by_memory, self._config.kv_slots or None) if num is not None), default=None)

    def listen(self, connections: Connections) -> None:
        """Let the source take what has come; whoever waits for ``connections`` hears of what comes later."""
        if self._is_closed:
            return
        self._let_hear(connections)
        self.session.wait(0.0)
        if not self.session.is_lost:
            return
        if self._attempt is not None:
            self._go_on(self._attempt)
        elif self._lost_s is None:
            self._lose()
        elif time.monotonic() >= self._next_s:
            self._begin_again()

    def _let_hear(self, connections: Connections) -> None:
        if connections is self._heard:
            return
        assert isinstance(connections, RemoteConnections), "in one process there is no draft worker"
        self._heard = connections
        for own in (self.session.connections, self._attempt):
            if own is not None and not own.is_over:
                connections.watch(own.sockets)

    def _lose(self) -> None:
        self._lost_s = self._next_s = time.monotonic()
        self._num_losses = 1 + (0 if self._lost_s - self._since_s > STEADY_S else self._num_losses)
        self._end(self.session.connections)
        then = "until it is back"
        if self._num_losses == MAX_LOSSES:
            self._is_closed = True
            then = f"from now on, since it was lost {MAX_LOSSES} times"
        logger.warning("%s; n-grams draft %s", self.session.problem, then)
        self.on_change(None)

    def _begin_again(self) -> None:
        """The connection waits until somebody listens there."""
        launcher = self._pipeline.launcher
        assert launcher is not None and self._heard is not None
        self._next_s = time.monotonic() + _RETRY_S
        self._attempt = connect(self._pipeline.spec, launcher)
        self._heard.watch(self._attempt.sockets)

    def _go_on(self, attempt: RemoteConnections) -> None:
        try:
            if (ready := attempt.poll_ready(lambda done: None, 0.0)) is None:
                return
            pipeline = Pipeline(self._pipeline.spec, attempt, self._pipeline.launcher)
            pipeline.use(ready)
        except FlowspecError as error:
            is_news = isinstance(error, UsageError) and str(error) != self._told  # else it just takes its time
            logger.log(logging.WARNING if is_news else logging.DEBUG, "the draft worker is not back yet: %s", error)
            self._told = str(error) if is_news else self._told
            self._attempt, self._next_s = None, time.monotonic() + _RETRY_S
            self._end(attempt)
            return
        assert self.session.source is not None and self._lost_s is not None, "it was ready once"
        self._pipeline, self._attempt = pipeline, None
        self._bytes_before += self.session.connections.link_bytes
        session = DraftSession(attempt, pipeline.spec.link.stall_timeout_s)
        session.source = self.session.source.renewed(session, self._num_slots(pipeline))
        self.session = session
        logger.warning("the draft worker is back after %.1f s, for later requests", time.monotonic() - self._lost_s)
        self._since_s, self._lost_s = time.monotonic(), None
        self.on_change(session.source)

    def close(self) -> None:
        """Safe to call twice."""
        self._is_closed = True
        for own in (self.session.connections, self._attempt):
            if own is not None:
                self._end(own)

    def _end(self, own: RemoteConnections) -> None:
        if self._heard is not None and not own.is_over:
            self._heard.unwatch(own.sockets)
        own.end_session()


def _remote(pipeline: Pipeline) -> RemoteConnections:
    assert isinstance(pipeline.connections, RemoteConnections), "it is a process"
    return pipeline.connections


def open_draft_worker(
    address: str,
    draft: ChosenDraft,
    draft_dtype: DraftDType,
    dtype: DType,
    device: str,
    link: LinkConfig,
    config: EngineConfig,
    workers: Sequence[str] | None,
) -> DraftWorker:
    """Let the worker begin to load the small model. Raises ``UsageError``, also for any other draft.

    ``device``: of the driver. ``workers``: addresses of the pipeline's.
    """
    if not isinstance(draft, Checkpoint):
        kind = draft if isinstance(draft, str) else "a draft head or source"
        raise UsageError(
            f"a draft worker runs a small model, and the draft is {kind}; name a smaller model with --draft, or leave "
            "--draft-worker out"
        )
    if tcp_endpoint(address) in map(tcp_endpoint, workers or ()):
        raise UsageError(f"{address} is one of the workers already; give the draft a worker of its own")
    layers = Partition.even(draft.num_layers, 1)
    # What its device can, the worker says.
    in_turn: Sequence[Weights] = [draft_dtype]
    if draft_dtype == "auto":
        in_turn = weights_to_try(draft, "auto", device)
    link = replace(link, int8_wire=False)  # there are no hidden states on it
    spec = PipelineSpec(draft, layers, [address], dtype=dtype, weights=in_turn[0], link=link, num_best=NUM_BEST)
    return DraftWorker(open_pipeline(spec), config, in_turn[1:])
