"""Engines for tests."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec.cluster.inproc import InprocConnections
from flowspec.cluster.local import LocalProcesses
from flowspec.engine.engine import Engine
from flowspec.engine.job import Job
from flowspec.engine.spec import EngineSpec, open_engine
from flowspec.worker.actor import Worker


def engine_of(model: str | Path, **settings: Any) -> Engine:
    """By the fields of ``EngineSpec``; of use as a context manager. Its draft is not checked unless that is wanted."""
    return open_engine(EngineSpec(model, **{"draft_check": "off", **settings}))


def workers_of(engine: Engine) -> list[Worker]:
    """Of an engine whose workers are in this process."""
    connections = engine.pipeline.connections
    assert isinstance(connections, InprocConnections)
    return connections.workers


# --- workers that are lost ---


@dataclass(frozen=True)
class Fault:
    num_tokens: int  # of all requests together, after which it happens
    stage: int
    signal: signal.Signals


def launcher_of(engine: Engine) -> LocalProcesses:
    launcher = engine.pipeline.launcher
    assert isinstance(launcher, LocalProcesses)
    return launcher


def hit(engine: Engine, stage: int, sent: signal.Signals) -> None:
    """Send a signal to a stage's worker, once there is one."""
    while stage not in launcher_of(engine).pids:
        engine.step(0.05)
    with contextlib.suppress(ProcessLookupError):  # it has ended, and the engine has not read that yet
        os.kill(launcher_of(engine).pids[stage], sent)


def run(engine: Engine, jobs: Sequence[Job], faults: Sequence[Fault] = ()) -> None:
    """To the end of all, with faults on their way."""
    left = list(faults)
    while not all(job.is_finished for job in jobs):
        engine.step()
        if left and sum(len(job.output_ids) for job in jobs) >= left[0].num_tokens:
            hit(engine, left[0].stage, left.pop(0).signal)
    assert not left, "a fault came too late"
