"""SHA-256 of tensors as files store them; each is computed once, until its file changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from flowspec.model.tensor_files import StoredTensor
from flowspec.model.user_cache import cache_directory, keep

_READ_BYTES = 1 << 22


class TensorDigests:
    """What is known is kept in the user's cache, one small file for each file of weights."""

    def __init__(self, go_on: Callable[[], bool]) -> None:
        """``go_on``: asked now and then; once it says no, ``of`` raises ``InterruptedError``."""
        self._go_on = go_on
        self._folder = cache_directory("digests")
        self._known: dict[Path, dict[str, str]] = {}  # by file of weights, by place in it
        self._new: set[Path] = set()

    def of(self, stored: StoredTensor) -> str:
        """In hex. Raises ``ModelError`` where the file cannot be read."""
        known = self._known.get(stored.path)
        if known is None:
            known = self._known[stored.path] = self._read(stored.path)
        place = f"{stored.offset}+{stored.num_bytes}"
        if place not in known:
            known[place] = self._compute(stored)
            self._new.add(stored.path)
        return known[place]

    def save(self) -> None:
        """Without a word where the cache cannot be written: they are computed again then."""
        with contextlib.suppress(OSError):
            for path in self._new:
                keep(self._kept_at(path), json.dumps(self._known[path]).encode())
        self._new.clear()

    def _compute(self, stored: StoredTensor) -> str:
        digest = hashlib.sha256()
        for start in range(0, stored.num_bytes, _READ_BYTES):
            digest.update(stored.read(start, min(_READ_BYTES, stored.num_bytes - start)))
            if not self._go_on():
                raise InterruptedError
        return digest.hexdigest()

    def _read(self, path: Path) -> dict[str, str]:
        try:
            found = json.loads(self._kept_at(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _kept_at(self, path: Path) -> Path:
        """A file that was written again is another one."""
        found = os.stat(path)
        named = f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
        return self._folder / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"
