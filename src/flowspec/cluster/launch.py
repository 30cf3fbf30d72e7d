"""Brings workers up and ties them to a driver: local processes, workers on other machines, or all in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zmq

from flowspec.config import LinkConfig
from flowspec.core import DType, Partition
from flowspec.errors import FlowspecError, UsageError, WorkerError
from flowspec.model.hint_head import load_hinter
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import Stage
from flowspec.wire.messages import (
    PROTOCOL_VERSION,
    Busy,
    Configure,
    Echo,
    Emulation,
    Failure,
    Loading,
    Probe,
    Ready,
    Route,
    Send,
    Stop,
    ToDriver,
)
from flowspec.wire.transport import DRIVER, Connection, InprocNetwork
from flowspec.worker.actor import Worker

logger = logging.getLogger("flowspec.launch")

LoadProgress = Callable[[float], None]

_CHECK_INTERVAL_S = 0.1
_NUM_TRIPS = 8
_END_TIMEOUT_S = 5.0


class Cluster(Protocol):
    """The driver's side of all connections."""

    @property
    def link_bytes(self) -> int:
        """Bytes that the driver has sent along the data path and received as results."""
        ...

    @property
    def trips(self) -> Mapping[int, Trip]:
        """The newest known round trip to each worker, by stage."""
        ...

    def send(self, sends: Iterable[Send]) -> None: ...

    def receive(self, timeout_s: float) -> list[ToDriver]:
        """What has arrived; waits up to ``timeout_s`` for the first message. Raises ``WorkerError``."""
        ...

    def wake(self) -> None:
        """Let a ``receive`` that waits return; any thread may call it."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Trip:
    """A round trip on a control connection; a worker answers between two pieces of its work."""

    round_trip_s: float
    clock_offset_s: float  # the driver's clock less the worker's, at most half a round trip off


class InprocCluster:
    """All workers in this process, one after the other: no parallelism, no sockets; for tests and for debugging."""

    def __init__(
        self, checkpoint: Checkpoint, partition: Partition, dtype: DType, device: str, hints: str | None = None
    ) -> None:
        self._workers: list[Worker] = []
        for index, layers in enumerate(partition.stages, start=1):
            hinter = None if hints is None else load_hinter(hints, checkpoint, layers.end, dtype, device)
            stage = Stage.load(checkpoint, layers, dtype, device)
            self._workers.append(Worker(stage, index, time.perf_counter, hinter=hinter, layers=str(layers)))
        self._network = InprocNetwork(len(partition))

    @property
    def link_bytes(self) -> int:
        return self._network.num_bytes

    @property
    def trips(self) -> Mapping[int, Trip]:
        return dict.fromkeys(range(1, len(self._workers) + 1), Trip(0.0, 0.0))

    def send(self, sends: Iterable[Send]) -> None:
        self._network.post(DRIVER, sends)

    def receive(self, timeout_s: float) -> list[ToDriver]:
        """Deliver what is waiting and let every worker do one piece of work; never waits."""
        received: list[Any] = []
        for link in self._network.waiting():
            message = self._network.take(link)
            if link.target == DRIVER:
                received.append(message)
            else:
                self._network.post(link.target, self._workers[link.target - 1].on_message(message))
        for index, worker in enumerate(self._workers, start=1):
            self._network.post(index, worker.on_idle() or [])
        return received

    def wake(self) -> None:
        """It never waits."""

    def close(self) -> None:
        for worker in self._workers:
            worker.check_integrity()


class LocalProcesses:
    """Worker processes on this machine. Ended by ``close``, and by themselves when this process dies.

    One child imports what workers need and forks them, so that this is paid once and not for every worker.
    """

    def __init__(self, num_workers: int, threads: int, device: str, module: str = "flowspec.worker.local") -> None:
        """``module``: that forks them; see there."""
        self._directory = Path(tempfile.mkdtemp(prefix="flowspec-"))
        self.addresses = [f"ipc://{self._directory / str(i)}" for i in range(1, num_workers + 1)]
        command = [sys.executable, "-m", module, str(threads), device, *self.addresses]
        try:
            self._launcher = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the workers end when it closes
                stdout=subprocess.PIPE,  # one line for each worker that has ended
                start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers
            )
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        assert self._launcher.stdout is not None
        os.set_blocking(self._launcher.stdout.fileno(), False)

    def check(self) -> None:
        """Raises ``WorkerError`` when a worker has ended."""
        assert self._launcher.stdout is not None
        if news := self._launcher.stdout.readline():
            index, code = map(int, news.split())
            raise WorkerError(f"worker {index} ended unexpectedly ({_describe_exit(code)})")
        if self._launcher.poll() is not None:
            raise WorkerError(f"the workers ended unexpectedly ({_describe_exit(self._launcher.returncode)})")

    def close(self) -> None:
        """Returns when all workers have ended."""
        assert self._launcher.stdin is not None and self._launcher.stdout is not None
        self._launcher.stdin.close()
        try:
            self._launcher.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._launcher.pid, signal.SIGKILL)  # it leads the session that all workers are in
            self._launcher.wait()
        self._launcher.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class RemoteCluster:
    """Connections to running workers, local or elsewhere, for one session."""

    def __init__(self, addresses: Sequence[str], config: LinkConfig, processes: LocalProcesses | None = None) -> None:
        self._config = config
        self._processes = processes
        self._session = uuid.uuid4().hex
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._wake_end, self._woken_end = socket.socketpair()
        self._wake_end.setblocking(False)
        self._woken_end.setblocking(False)
        self._poller.register(self._woken_end.fileno(), zmq.POLLIN)
        self._num_bytes = 0
        self._last_check = 0.0
        self._probe_sent_s: float | None = None
        self._trips: dict[int, deque[Trip]] = {}
        self._controls: list[Connection] = []
        try:
            for address in addresses:
                self._controls.append(self._connect(address, "control"))
            self._data = self._connect(addresses[0], "data")
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str, kind: Any) -> Connection:
        connection = Connection(self._context, address, self._session, kind, self._config.heartbeat_s)
        for end in connection.sockets:
            self._poller.register(end, zmq.POLLIN)
        return connection

    @property
    def link_bytes(self) -> int:
        return self._num_bytes

    @property
    def trips(self) -> Mapping[int, Trip]:
        """The shortest of the last few, which waited least for the worker's own work."""
        known = [(stage, list(trips)) for stage, trips in list(self._trips.items())]  # copies: any thread may ask
        return {stage: min(trips, key=lambda trip: trip.round_trip_s) for stage, trips in known}

    def configure(
        self,
        model: str,
        partition: Partition,
        dtype: DType,
        emulation: Emulation | None = None,
        hints: str | None = None,
    ) -> None:
        """Tell every worker which stage to load, whom to pass it on to, what device to play, and where hints are."""
        addresses = [connection.address for connection in self._controls]
        for index, (connection, layers) in enumerate(zip(self._controls, partition.stages, strict=True)):
            connection.send(
                Configure(
                    PROTOCOL_VERSION,
                    index + 1,
                    len(partition),
                    model,
                    layers.start,
                    layers.end,
                    dtype,
                    addresses[index + 1] if index + 1 < len(addresses) else None,
                    self._config.heartbeat_s,
                    emulation,
                    hints,
                    self._config.int8_wire,
                )
            )

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        """Wait until every worker has loaded its stage and reached the next worker. Raises ``FlowspecError``."""
        loaded = dict.fromkeys(range(1, len(self._controls) + 1), 0.0)
        ready: dict[int, Ready] = {}
        last_news = dict.fromkeys(loaded, time.monotonic())  # of each worker on its own
        while len(ready) < len(self._controls):
            for stage, message in self._receive(0.2):
                match message:
                    case Loading():
                        loaded[stage], last_news[stage] = message.fraction, time.monotonic()
                    case Ready():
                        loaded[stage], ready[stage] = 1.0, message
                    case _:
                        last_news[stage] = time.monotonic()
                progress(sum(loaded.values()) / len(loaded))
            self._check_news(last_news, ready)
        return [ready[stage] for stage in sorted(ready)]

    def _check_news(self, last_news: Mapping[int, float], ready: Mapping[int, Ready]) -> None:
        """Each worker has a deadline of its own: what others say is no sign of it."""
        deadline = time.monotonic() - self._config.start_timeout_s
        silent = [stage for stage, news_s in last_news.items() if stage not in ready and news_s < deadline]
        if not silent:
            return
        names = ", ".join(f"worker {stage} ({self._controls[stage - 1].address})" for stage in silent)
        are_up = all(self._controls[stage - 1].is_up for stage in silent)
        question = (
            "does it hang while it loads?"
            if are_up
            else "is 'flowspec worker' running there, and is the address right?"
        )
        raise WorkerError(f"no sign of {names} for {self._config.start_timeout_s:.0f} s; {question}")

    def send(self, sends: Iterable[Send]) -> None:
        for send in sends:
            match send.route:
                case Route.NEXT:
                    self._num_bytes += self._data.send(send.message)
                case Route.WORKERS:
                    for connection in self._controls:
                        connection.send(send.message)
                case Route.DRIVER:
                    raise AssertionError("the driver does not send to itself")

    def receive(self, timeout_s: float) -> list[ToDriver]:
        """As ``Cluster.receive``; a worker's failure, or its loss, is raised as the error that it is."""
        return [message for _, message in self._receive(timeout_s)]

    def _receive(self, timeout_s: float) -> list[tuple[int, ToDriver]]:
        """With the stage that sent it."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._woken_end.fileno() in ready:
            self._woken_end.recv(4096)
        received: list[tuple[int, ToDriver]] = []
        for index, connection in enumerate(self._controls, start=1):
            while (arrived := connection.receive()) is not None:
                message, num_bytes = arrived
                self._num_bytes += num_bytes
                if isinstance(message, Echo):
                    self._note_echo(index, message)
                else:
                    received.append((index, _raise_failure(message, index, connection.address)))
        if timeout_s > 0 or time.monotonic() - self._last_check > _CHECK_INTERVAL_S:
            self._check_workers()
        return received

    def probe(self) -> None:
        """Measure the round trips to all workers; their answers are read with everything else."""
        self._probe_sent_s = time.perf_counter()
        for connection in self._controls:
            connection.send(Probe(0, b""))

    def _note_echo(self, stage: int, echo: Echo) -> None:
        if self._probe_sent_s is not None:
            now = time.perf_counter()
            trip = Trip(now - self._probe_sent_s, (now + self._probe_sent_s) / 2 - echo.clock_s)
            self._trips.setdefault(stage, deque(maxlen=_NUM_TRIPS)).append(trip)

    def _check_workers(self) -> None:
        self._last_check = time.monotonic()
        if self._processes is not None:
            self._processes.check()
        for index, connection in enumerate([*self._controls, self._data]):
            connection.check()
            if connection.is_lost:
                worker = f"worker {index + 1 if index < len(self._controls) else 1}"
                raise WorkerError(f"lost {worker} ({connection.address}); the run cannot go on without it")

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: a call is on its way already; closed: nobody waits
            self._wake_end.send(b"w")

    def close(self) -> None:
        """End the session; local processes end too, others go back to waiting."""
        for connection in self._controls:
            connection.send(Stop())
            connection.close(linger_s=0.5)
        if hasattr(self, "_data"):
            self._data.close()
        self._context.term()
        self._wake_end.close()
        self._woken_end.close()
        if self._processes is not None:
            self._processes.close()


def _raise_failure(message: ToDriver, index: int, address: str) -> ToDriver:
    match message:
        case Failure():
            logger.debug("worker %d: %s", index, message.traceback)
            error: type[FlowspecError] = UsageError if message.user_error else WorkerError
            raise error(message.text if message.user_error else f"worker {index} ({address}) failed: {message.text}")
        case Busy():
            raise WorkerError(f"worker {index} ({address}) is busy: {message.reason}")
        case _:
            return message


def num_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_threads(num_workers: int) -> int:
    """Torch threads for each of so many workers on this machine, the driver counted as one more."""
    return max(1, num_cores() // (num_workers + 1))
