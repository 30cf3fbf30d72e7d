"""A worker that holds a small model as draft: brought up, listened to, and given up when it is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from flowspec.cluster.connections import Connections, LoadProgress, RemoteConnections
from flowspec.config import LinkConfig
from flowspec.core import DraftDType, DType, Partition
from flowspec.draft.catalogue import ChosenDraft, weights_of
from flowspec.draft.remote_passes import NUM_BEST, RemoteModelSource
from flowspec.engine.pipeline import Pipeline, PipelineSpec, open_pipeline
from flowspec.errors import FlowspecError, UsageError
from flowspec.model.loader import Checkpoint
from flowspec.wire.actor import Route, Send
from flowspec.wire.messages import Commit, DataMessage
from flowspec.wire.transport import tcp_endpoint

logger = logging.getLogger("flowspec.draft")


class DraftWorker:
    """A ``draft.remote_passes.Port`` over a pipeline of one stage, which has the lm_head too."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Use ``open_draft_worker`` to make one."""
        assert isinstance(pipeline.connections, RemoteConnections), "it is a process"
        self.pipeline = pipeline
        self.is_lost = False
        self._own = pipeline.connections
        self._roused: RemoteConnections | None = None
        self.on_loss: Callable[[], None] = lambda: None  # of whoever uses it
        self._source: RemoteModelSource | None = None

    def await_ready(self, source: RemoteModelSource, progress: LoadProgress) -> None:
        """Until it has loaded the model; what comes then is for ``source``.

        Raises ``WorkerError``, and ``UsageError`` for what the user can mend.
        """
        self._source = source
        try:
            self.pipeline.await_ready(progress)
        except UsageError as error:
            raise UsageError(f"draft worker {self.pipeline.addresses[0]}: {error}") from None

    def listen(self, connections: Connections) -> None:
        """Let the source take what has come; whoever waits for ``connections`` hears of what comes later."""
        if connections is not self._roused and not self.is_lost:
            assert isinstance(connections, RemoteConnections), "in one process there is no draft worker"
            self._roused = connections
            connections.watch(self._own.sockets)
        self.wait(0.0)

    def send(self, message: DataMessage | Commit) -> None:
        self._own.send([Send(Route.NEXT, message)])

    def wait(self, timeout_s: float) -> None:
        """As ``Port.wait``. A worker that is lost, or says what it may not, is given up."""
        if self.is_lost:
            return
        try:
            for message in self._own.receive(timeout_s):
                if self._source is not None:
                    self._source.take(message)
        except FlowspecError as error:
            logger.warning("%s; n-grams draft from now on, until this is started again", error)
            self.close()
            self.on_loss()

    def close(self) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        if self._roused is not None:
            self._roused.unwatch(self._own.sockets)
        self._own.close()


def open_draft_worker(
    address: str,
    draft: ChosenDraft,
    draft_dtype: DraftDType,
    dtype: DType,
    device: str,
    link: LinkConfig,
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
    # It is given up when it is lost: nobody waits for it to come back.
    link = replace(link, int8_wire=False, rejoin_timeout_s=0.0, reassign_after_s=0.0)
    weights = weights_of(draft, draft_dtype, device)
    spec = PipelineSpec(draft, layers, [address], dtype=dtype, weights=weights, link=link, num_best=NUM_BEST)
    return DraftWorker(open_pipeline(spec))
