"""Tensors that came from a driver, on this device's disk: by SHA-256, up to a number of bytes, the oldest go first.

A tensor that has not come whole lies beside the others as ``SHA256.partial``, and is gone on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from flowspec.errors import UsageError, first_line

_READ_BYTES = 1 << 22
_SPARE_BYTES = 1 << 28  # of the disk, that stay free


class BlobCache:
    """Several workers of a device may share a folder."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self._most_bytes = most_bytes

    def path(self, digest: str) -> Path:
        return self.folder / "tensors" / digest

    def has(self, digest: str, num_bytes: int) -> bool:
        """And note that it is of use: what is not goes first."""
        path = self.path(digest)
        try:
            found = path.stat()
            if found.st_size != num_bytes:
                return False
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))  # it was not written: whoever has read it has it all
            return True
        except OSError:
            return False

    def make_room(self, num_bytes: int, kept: Iterable[str]) -> None:
        """For so many more. ``kept``: contents that stay. Raises ``UsageError`` where there can be no such room."""
        try:
            self.path("").mkdir(parents=True, exist_ok=True)
            names = set(kept)
            names |= {f"{name}.partial" for name in names}
            found = _files(self.path(""))
            num_held = sum(stat.st_size for stat, _ in found)
            oldest = sorted((s.st_atime_ns, s.st_size, e.path) for s, e in found if e.name not in names)
            own = num_held - sum(size for _, size, _ in oldest)
            if own + num_bytes > self._most_bytes:
                raise UsageError(
                    f"this stage's weights take {(own + num_bytes) / 1e9:.2f} GB, and {self.folder} may hold "
                    f"{self._most_bytes / 1e9:.2f} GB; give this worker a larger --cache-gb, or fewer layers"
                )
            while oldest and (num_held + num_bytes > self._most_bytes or self._free_bytes() < num_bytes):
                _, size, path = oldest.pop(0)
                if _is_idle(path):
                    Path(path).unlink(missing_ok=True)
                    num_held -= size
            if self._free_bytes() < num_bytes:
                raise UsageError(
                    f"this stage's weights need {num_bytes / 1e9:.2f} GB more, and the disk of {self.folder} has "
                    f"{max(0, self._free_bytes()) / 1e9:.2f} GB; make room, or name another place in XDG_CACHE_HOME"
                )
        except OSError as error:
            raise self._unusable(error) from error

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free - _SPARE_BYTES

    def open_partial(self, digest: str, num_bytes: int) -> PartialBlob:
        """Raises ``UsageError`` where it cannot be written."""
        try:
            return PartialBlob(self.path(digest), num_bytes)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(
            f"weights cannot be kept in {self.folder} ({first_line(error)}); give it permissions or room, or name "
            "another place in XDG_CACHE_HOME"
        )


def _files(folder: Path) -> list[tuple[os.stat_result, os.DirEntry[str]]]:
    """Less what another worker has renamed or removed in between."""
    found: list[tuple[os.stat_result, os.DirEntry[str]]] = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            found.append((entry.stat(), entry))
    return found


class PartialBlob:
    """One that is coming."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """With what has come before. Raises ``OSError``."""
        self._path = path
        self._num_bytes = num_bytes
        self._partial, self._file = _open_alone(path)
        self._digest = hashlib.sha256()
        self.size = 0
        while data := self._file.read(min(_READ_BYTES, num_bytes - self.size)):
            self._digest.update(data)
            self.size += len(data)
        self._file.truncate()

    @property
    def is_whole(self) -> bool:
        return self.size == self._num_bytes

    def append(self, data: bytes) -> None:
        """Raises ``UsageError`` where the disk takes no more."""
        try:
            self._file.write(data)
        except OSError as error:
            raise UsageError(f"{self._partial} cannot be written ({first_line(error)}); make room there") from error
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> bool:
        """Whether all has come, and is what it should be; else nothing of it is left."""
        is_right = self._digest.hexdigest() == self._path.name
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            if is_right:
                os.replace(self._partial, self._path)
            else:
                self._partial.unlink(missing_ok=True)
            self._file.close()  # and with it the lock
        except OSError as error:
            raise UsageError(f"{self._partial} cannot be written ({first_line(error)}); make room there") from error
        return is_right

    def close(self) -> None:
        """What has come stays."""
        with contextlib.suppress(OSError):
            self._file.close()


def _open_alone(path: Path):  # type: ignore[no-untyped-def]
    """A file for what is coming, and its path: the usual one, or one of this process where another one writes that."""
    candidates = [path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.{os.getpid()}.partial")]
    while candidates:
        file = open(candidates[0], "a+b")  # noqa: SIM115 - its owner closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            del candidates[0]
            continue
        if _is_at(file.fileno(), candidates[0]):
            file.seek(0)
            return candidates[0], file
        file.close()  # between the two calls its writer has finished it
    raise BlockingIOError(f"{path.name} is being written already")


def _is_idle(path: str) -> bool:
    """Whether no worker is writing it."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
