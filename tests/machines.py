"""Machines with a switch between them, for tests: a network of their own, and a disk each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import namespaces
from flowspec.wire.key_file import STATE_VARIABLE
from namespaces import Network


@contextmanager
def network_of(num_machines: int, mbps: float) -> Iterator[Network]:
    """Skips the test where none can be made."""
    if (reason := namespaces.why_not()) is not None:
        pytest.skip(reason)
    made = Network(num_machines, mbps)
    try:
        yield made
    finally:
        made.close()


def environment(folder: Path, place: int) -> dict[str, str]:
    """Of a machine with a disk of its own."""
    own = {STATE_VARIABLE: str(folder / f"state{place}"), "XDG_CACHE_HOME": str(folder / f"cache{place}")}
    return {**os.environ, **own}
