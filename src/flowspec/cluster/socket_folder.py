"""Folders for the sockets of one machine's workers, and what is left of those whose owners were killed.

Whoever uses a folder holds a lock on a file in it, which the system takes back however that process ends: a folder
whose lock can be had belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "flowspec-sockets-"
_LOCK = "lock"
_MAX_PARENT_BYTES = 64  # the address of a socket may have about a hundred in all
_SHORT_PARENT = "/tmp"


class SocketFolder:
    """A new folder in the temporary directory, until it is closed; clears those that belong to nobody."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(os.fsencode(parent)) > _MAX_PARENT_BYTES:
            parent = _SHORT_PARENT
        _clear(Path(parent))
        self._lock: int | None = None
        while self._lock is None:  # somebody may have taken it for left over, just before it was locked
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._lock = _lock(self.path / _LOCK, os.O_CREAT)

    def close(self) -> None:
        """Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _clear(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        # One without a lock is somebody's who is just making it.
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = _lock(path / _LOCK, 0)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(path: Path, flags: int) -> int | None:
    """The descriptor that holds the lock; ``None`` when somebody else has it, or has removed the file meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
