"""Files of keys, which nobody but their owner may read."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowspec.errors import UsageError

STATE_VARIABLE = "FLOWSPEC_STATE"  # names the folder


def state_folder() -> Path:
    """Where this user's keys are: the folder that the environment names, or the usual one for programs' state."""
    if named := os.environ.get(STATE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "flowspec"


def read_keys(path: Path) -> dict[str, Any] | None:
    """``None`` where there is no such file. Raises ``UsageError`` for one that others can read, or that is damaged."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the keys in {path}: {error}") from None
    if mode & 0o077:
        raise UsageError(f"others can read the keys in {path}; make them anew, or: chmod 600 {path}")
    try:
        keys = json.loads(text)
    except ValueError:
        keys = None
    if not isinstance(keys, dict):
        raise UsageError(f"{path} is damaged; delete it, and join anew")
    return keys


def write_keys(path: Path, keys: dict[str, Any]) -> None:
    """All or nothing. Raises ``UsageError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # which only its owner may read
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(keys, file, indent=1)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"cannot write the keys to {path}: {error}") from None


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Other processes that are to change the same keys wait meanwhile. Raises ``UsageError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise UsageError(f"cannot write the keys to {path}: {error}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
