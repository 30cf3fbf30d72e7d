"""The driver's files for workers that have none: of what a stage is made, and its tensors chunk by chunk."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from typing import NamedTuple

from flowspec.core import LayerRange, Partition, StageManifest
from flowspec.errors import require
from flowspec.model.loader import Checkpoint
from flowspec.model.received import make_manifest
from flowspec.model.tensor_digests import TensorDigests
from flowspec.model.tensor_files import StoredTensor
from flowspec.wire.messages import CHUNK_BYTES, Chunk, Manifest, WantChunk

logger = logging.getLogger("flowspec.cluster")


class _Made(NamedTuple):
    manifest: StageManifest
    places: Mapping[str, StoredTensor]  # by SHA-256


class WeightServer:
    """Of one session. A thread of its own reads the files once to compute their digests, which may take a while."""

    def __init__(
        self, checkpoint: Checkpoint, partition: Partition, draft: str | None = None, with_head: bool = False
    ) -> None:
        """``draft``: the directory, or the place, of one whose hint heads the stages are to have too.

        ``with_head``: they are to have the lm_head.
        """
        self._checkpoint = checkpoint
        self._partition = partition
        self._draft = draft
        self._with_head = with_head
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # stages; ``None`` ends the thread
        self._made: queue.SimpleQueue[tuple[int, _Made | Exception]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._stored: dict[int, list[StoredTensor]] = {}  # what each stage may ask for
        self._last: dict[int, tuple[int, int]] = {}  # the newest tensor and offset that each has asked for

    def want_manifest(self, stage: int) -> None:
        """Make it, for ``made`` to return."""
        self._stored.pop(stage, None)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._asked.put(stage)

    def made(self) -> Mapping[int, Manifest]:
        """By stage, what has been made since the last call. Raises ``ModelError``."""
        manifests: dict[int, Manifest] = {}
        while not self._made.empty():
            stage, made = self._made.get()
            if isinstance(made, Exception):
                raise made
            wanted = made.manifest.wanted()
            self._stored[stage] = [made.places[entry.sha256] for entry in wanted]
            self._last[stage] = (-1, 0)
            num_bytes = sum(entry.num_bytes for entry in wanted)
            logger.info("worker %d has not this model, and gets its stage: up to %.1f MB", stage, num_bytes / 1e6)
            manifests[stage] = Manifest(made.manifest)
        return manifests

    def chunk(self, stage: int, want: WantChunk) -> Chunk:
        """Raises ``ProtocolError`` for what a worker does not ask for, ``ModelError`` for files that changed."""
        stored = self._stored.get(stage, [])
        require(0 <= want.tensor < len(stored), f"it wants tensor {want.tensor} of {len(stored)}")
        found = stored[want.tensor]
        require(0 <= want.offset < found.num_bytes, f"it wants byte {want.offset} of {found.num_bytes}")
        require((want.tensor, want.offset) > self._last[stage], "it asks for the same weights again")
        self._last[stage] = want.tensor, want.offset
        num_bytes = min(CHUNK_BYTES, found.num_bytes - want.offset)
        return Chunk(want.tensor, want.offset, found.read(want.offset, num_bytes))

    def close(self) -> None:
        self._is_closed = True
        self._asked.put(None)

    def _run(self) -> None:
        while (stage := self._asked.get()) is not None:
            try:
                self._made.put((stage, self._make(self._partition.stages[stage - 1])))
            except InterruptedError:
                return
            except Exception as error:  # for whoever waits
                self._made.put((stage, error))

    def _make(self, layers: LayerRange) -> _Made:
        digests = TensorDigests(lambda: not self._is_closed)
        made = _Made(*make_manifest(self._checkpoint, layers, digests.of, self._draft, self._with_head))
        digests.save()
        return made
