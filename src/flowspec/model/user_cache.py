"""The user's cache: what can be made, or fetched, again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(name: str) -> Path:
    """Where things of a kind lie, or will."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowspec" / name


def keep(path: Path, content: bytes) -> None:
    """Write a file, which is replaced at once or not at all, whoever else writes it. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
