"""Engines for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowspec.cluster.inproc import InprocConnections
from flowspec.engine.engine import Engine
from flowspec.engine.spec import EngineSpec, open_engine
from flowspec.worker.actor import Worker


def engine_of(model: Path, **settings: Any) -> Engine:
    """By the fields of ``EngineSpec``; of use as a context manager."""
    return open_engine(EngineSpec(model, **settings))


def workers_of(engine: Engine) -> list[Worker]:
    """Of an engine whose workers are in this process."""
    connections = engine.pipeline.connections
    assert isinstance(connections, InprocConnections)
    return connections.workers
