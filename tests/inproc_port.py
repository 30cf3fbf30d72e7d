"""A draft worker in this process: the real one's actor, and a source over it."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from flowspec.core import LayerRange
from flowspec.draft.catalogue import load_draft
from flowspec.draft.remote_passes import RemoteModelSource
from flowspec.model.backends import load_head
from flowspec.model.loader import Checkpoint
from flowspec.model.target_head import BestTokens, TargetHead
from flowspec.wire.codec import Codec
from flowspec.wire.messages import Commit, DataMessage
from flowspec.worker.actor import Worker
from flowspec.worker.checks import Limits
from pump import stage_of


class InprocPort:
    """The worker, as an actor; what it is told passes the codec. It works when it is waited for, or told to."""

    def __init__(self, small: Path, num_best: int = 256) -> None:
        checkpoint, self._codec = Checkpoint.open(small), Codec()
        guesser = BestTokens(load_head(checkpoint, "float32", "float", "cpu"))
        stage, limits = stage_of(small, LayerRange(0, checkpoint.num_layers)), Limits.of(checkpoint)
        clock = iter(range(10**9)).__next__
        self.worker = Worker(stage, 1, clock, 0.0, limits=limits, guesser=guesser, num_best=num_best)
        self.is_lost = False
        self.source: RemoteModelSource | None = None
        self.num_rows: list[int] = []  # of each segment
        self._inbox: deque[DataMessage | Commit] = deque()
        self._idle = False

    def send(self, message: DataMessage | Commit) -> None:
        frames = [bytearray(frame) for frame in self._codec.encode(message)]
        self._inbox.append(self._codec.decode_to_worker(frames))  # type: ignore[arg-type]
        self._idle = False

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or not self._idle

    def work(self) -> None:
        if self._inbox:
            message = self._inbox.popleft()
            self.num_rows += [len(getattr(message, "node_ids", []))] if hasattr(message, "node_ids") else []
            sends = self.worker.on_message(message)
        else:
            sends = self.worker.on_idle()
            self._idle = sends is None
        for send in sends or []:
            answer = self._codec.decode_to_driver([bytearray(frame) for frame in self._codec.encode(send.message)])
            if self.source is not None:
                self.source.take(answer)

    def wait(self, timeout_s: float) -> None:
        if self.has_work:
            self.work()


def remote_source(target: Path, small: Path, port: InprocPort) -> RemoteModelSource:
    checkpoint = Checkpoint.open(target)
    head = TargetHead(checkpoint.load_lm_head("float32", "cpu"))
    source = load_draft(Checkpoint.open(small), checkpoint, head, "float32", "cpu", port=port)
    assert isinstance(source, RemoteModelSource)
    port.source = source
    return source
