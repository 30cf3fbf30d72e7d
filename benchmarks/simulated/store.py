"""Keeps what was simulated, so that a run of hours goes on where it was stopped. Only what the same code has made."""

from __future__ import annotations

import hashlib
import pickle
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import flowspec
from flowspec.schedule.catalogue import is_flow

SOURCE = Path(flowspec.__file__).parent
OTHER_ROOMS = ("cli", "server", "talk", "train", "engine", "cluster", "demo")  # nothing there is simulated
FLOW_ONLY = ("flow.py", "auto.py", "pace.py")  # of the schedules: what the others' figures do not depend on


class Asked(Protocol):
    """What one process is to do; its ``repr`` says all that the result depends on, the code apart."""

    @property
    def schedule(self) -> str: ...


class Store:
    """Results by the name of a function and what it was asked; in a folder that may be deleted at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, name: str, asked: Asked) -> Any | None:
        path = self._path(name, asked)
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def keep(self, name: str, asked: Asked, result: object) -> None:
        path = self._path(name, asked)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(pickle.dumps(result))
        temporary.replace(path)

    def _path(self, name: str, asked: Asked) -> Path:
        key = f"{code_version(is_flow(asked.schedule))} {name} {asked!r}"
        return self._folder / hashlib.sha256(key.encode()).hexdigest()[:32]


@cache
def code_version(is_flow: bool) -> str:
    """Of the code that a simulation of ``flow``, or of any other schedule, depends on."""
    digest = hashlib.sha256()
    for path in [*sorted(SOURCE.rglob("*.py")), Path(__file__).with_name("tuning.py")]:
        room = path.relative_to(SOURCE).parts[0] if path.is_relative_to(SOURCE) else ""
        if room not in OTHER_ROOMS and (is_flow or path.parent.name != "schedule" or path.name not in FLOW_ONLY):
            digest.update(path.read_bytes())
    return digest.hexdigest()
