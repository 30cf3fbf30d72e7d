"""Getting a stage's tensors from the driver: what is here already, what to ask for, what has come. No sockets."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flowspec.core import StageManifest, TensorEntry
from flowspec.errors import ModelError, require, shortened
from flowspec.model.loader import Checkpoint
from flowspec.model.received import check_manifest, open_received
from flowspec.wire.messages import CHUNK_BYTES, Chunk, Fetching, Manifest, Message, WantChunk, WantManifest
from flowspec.worker.blob_cache import BlobCache, PartialBlob

logger = logging.getLogger("flowspec.worker")

_NUM_AHEAD = 8  # chunks that are asked for before the first of them has come
_NUM_ROUNDS = 3  # in which all must have come
_TOLD_S = 10.0


class _Coming(NamedTuple):
    entry: TensorEntry
    blob: PartialBlob


class StageFetch:
    """Of one session. What has come is on the disk, and is asked for no more: by this session, or a later one."""

    def __init__(
        self, cache: BlobCache, model: str, check_fits: Callable[[StageManifest], None] = lambda manifest: None
    ) -> None:
        """``model``: as the driver calls it. ``check_fits``: raises for more than the device may hold."""
        self._cache = cache
        self._model = model
        self._check_fits = check_fits
        self._manifest: StageManifest | None = None
        self._wants: Iterator[WantChunk] = iter(())
        self._asked: deque[WantChunk] = deque()
        self._coming: deque[_Coming] = deque()  # tensors of which something is asked for, or has come
        self._num_rounds = 0
        self._told_s = time.monotonic()
        self.num_bytes = 0  # that have come
        self.num_wanted = 0  # bytes that were to come

    def begin(self) -> Message:
        """What to tell the driver first."""
        return WantManifest()

    @property
    def is_complete(self) -> bool:
        return self._manifest is not None and not self._asked and not self._missing(self._manifest)

    @property
    def has_hints(self) -> bool:
        """Whether what its hint head needs comes too."""
        return self._manifest is not None and bool(self._manifest.hints)

    def checkpoint(self) -> Checkpoint:
        """Once it is complete. Raises ``ModelError``."""
        assert self._manifest is not None, "nothing has come"
        config = hashlib.sha256(self._manifest.config).hexdigest()[:32]
        return open_received(self._model, self._manifest, self._cache.path, self._cache.folder / "configs" / config)

    def take(self, message: Manifest | Chunk) -> list[Message]:
        """What to ask for next; nothing, when all has come that was asked for.

        Raises ``ProtocolError``, ``UsageError`` where there is no room, and ``ModelError`` for what comes damaged.
        """
        match message:
            case Manifest():
                self._begin(message.stage)
            case Chunk():
                self._append(message)
        news: list[Message] = []
        while len(self._asked) < _NUM_AHEAD and (want := next(self._wants, None)) is not None:
            self._asked.append(want)
            news.append(want)
        if not self._asked and not self.is_complete:  # something has come damaged, or was deleted
            news.append(WantManifest())
        return news

    def progress(self) -> Fetching:
        """For the driver; people here are told now and then."""
        if time.monotonic() - self._told_s >= _TOLD_S:
            self._told_s = time.monotonic()
            logger.info("fetched %.1f of %.1f MB", self.num_bytes / 1e6, self.num_wanted / 1e6)
        return Fetching(self.num_bytes, self.num_wanted)

    def close(self) -> None:
        """What has come in part stays, and is gone on with."""
        for coming in self._coming:
            coming.blob.close()
        self._coming.clear()

    def _missing(self, manifest: StageManifest) -> list[tuple[int, TensorEntry]]:
        wanted = enumerate(manifest.wanted())
        return [(place, entry) for place, entry in wanted if not self._cache.has(entry.sha256, entry.num_bytes)]

    def _begin(self, manifest: StageManifest) -> None:
        require(not self._asked, "a manifest comes while chunks are on their way")
        if self._num_rounds == _NUM_ROUNDS:
            raise ModelError(
                f"{shortened(self._model)}: what comes from the driver is not what it has announced (SHA-256); are its "
                "files being written, or is this device's disk or memory broken?"
            )
        check_manifest(manifest)
        self._check_fits(manifest)
        self._num_rounds += 1
        self._manifest = manifest
        missing = self._missing(manifest)
        num_missing = sum(entry.num_bytes for _, entry in missing)
        self._cache.make_room(num_missing, [entry.sha256 for entry in manifest.wanted()])
        if missing:
            self.num_wanted += num_missing
            logger.info("fetching %.1f MB of %s from the driver", num_missing / 1e6, shortened(self._model))
        self._wants = self._plan(missing)

    def _plan(self, missing: list[tuple[int, TensorEntry]]) -> Iterator[WantChunk]:
        for place, entry in missing:
            blob = self._cache.open_partial(entry.sha256, entry.num_bytes)
            if blob.is_whole and not blob.finish():
                blob = self._cache.open_partial(entry.sha256, entry.num_bytes)
            self.num_wanted -= blob.size  # has come before
            if not blob.is_whole:
                self._coming.append(_Coming(entry, blob))
            for offset in range(blob.size, entry.num_bytes, CHUNK_BYTES):
                yield WantChunk(place, offset)

    def _append(self, chunk: Chunk) -> None:
        require(bool(self._asked), "nobody has asked for this chunk")
        want, coming = self._asked.popleft(), self._coming[0]
        num_bytes = min(CHUNK_BYTES, coming.entry.num_bytes - want.offset)
        is_asked = (chunk.tensor, chunk.offset, len(chunk.data)) == (want.tensor, want.offset, num_bytes)
        require(is_asked, f"{len(chunk.data)} bytes at {chunk.offset} of tensor {chunk.tensor} were not asked for")
        coming.blob.append(chunk.data)
        self.num_bytes += num_bytes
        if coming.blob.is_whole:
            self._coming.popleft()
            if not coming.blob.finish():
                logger.warning("%s came damaged, and is fetched again", shortened(coming.entry.name))
