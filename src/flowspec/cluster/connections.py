"""The driver's side of all connections to its workers, wherever those run and whoever has started them."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import zmq

from flowspec.cluster.replies import Replies
from flowspec.config import LinkConfig
from flowspec.core import DType, Partition, Weights
from flowspec.errors import FlowspecError, ProtocolError, UsageError, WorkerError
from flowspec.wire.actor import Route, Send
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
    Stop,
    ToDriver,
)
from flowspec.wire.transport import Connection

logger = logging.getLogger("flowspec.cluster")

LoadProgress = Callable[[float], None]

_CHECK_INTERVAL_S = 0.1
_NUM_TRIPS = 8
_BUSY_PATIENCE_S = 5.0  # until a worker must be free
_ASK_INTERVAL_S = 0.2


class Connections(Protocol):
    """The driver's side of all connections."""

    @property
    def link_bytes(self) -> int:
        """Bytes that the driver has sent along the data path and received as results."""
        ...

    @property
    def trips(self) -> Mapping[int, Trip]:
        """The newest known round trip to each worker, by stage."""
        ...

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        """Wait until every worker can begin; what each of them says of its stage, in order, where it says anything.

        Raises ``WorkerError``, and ``UsageError`` for what the user can mend.
        """
        ...

    def send(self, sends: Iterable[Send]) -> None: ...

    def probe(self) -> None:
        """Measure ``trips`` anew; the answers come with everything else."""

    def receive(self, timeout_s: float) -> list[ToDriver]:
        """What has arrived; waits up to ``timeout_s`` for the first message. Raises ``WorkerError``."""
        ...

    def wake(self) -> None:
        """Let a ``receive`` that waits return; any thread may call it, and after ``close`` too."""

    def close(self) -> None:
        """End the session, and what was started for it."""


@dataclass(frozen=True)
class Trip:
    """A round trip on a control connection; a worker answers between two pieces of its work."""

    round_trip_s: float
    clock_offset_s: float  # the driver's clock less the worker's, at most half a round trip off

    @property
    def to_driver_s(self) -> float:
        """What makes a time on the worker's clock one on the driver's.

        Within half a round trip nobody can tell the two apart, and local processes share one: 0 then.
        """
        return self.clock_offset_s if abs(self.clock_offset_s) > self.round_trip_s / 2 else 0.0


class Launcher(Protocol):
    """Who has the workers' processes: it has started them here, or knows where they run."""

    @property
    def addresses(self) -> Sequence[str]:
        """Of the workers, in pipeline order."""
        ...

    def check(self) -> None:
        """Raises ``WorkerError`` when a worker is known to have ended."""

    def close(self) -> None:
        """End what was started for this driver alone; returns when it has ended."""


@dataclass(frozen=True)
class RunningWorkers:
    """A ``Launcher`` for workers that somebody else has started, and that wait for a driver again afterwards."""

    addresses: Sequence[str]

    def check(self) -> None:
        """Their connections tell."""

    def close(self) -> None:
        """They go on."""


class RemoteConnections:
    """Connections to worker processes, local or elsewhere, for one session."""

    def __init__(self, launcher: Launcher, config: LinkConfig, replies: Replies | None = None) -> None:
        """``close`` closes the launcher too, and so does an exception here.

        ``replies``: what workers may say; ``None`` where they are emulated, and this program's own.
        """
        self._config = config
        self._replies = replies
        self._launcher = launcher
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
        self._configures: list[Configure] = []  # what each worker is asked for
        try:
            for place, address in enumerate(launcher.addresses, start=1):
                self._controls.append(self._connect(address, "control", place))
            self._data = self._connect(launcher.addresses[0], "data")
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str, kind: Any, place: int = 0) -> Connection:
        heartbeat_s = self._config.heartbeat_s
        connection = Connection(self._context, address, self._session, kind, heartbeat_s, place=place)
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
        weights: Weights = "float",
    ) -> None:
        """Tell every worker which stage to load, whom to pass it on to, what device to play, and where hints are."""
        addresses = self._launcher.addresses
        for index, (connection, layers) in enumerate(zip(self._controls, partition.stages, strict=True)):
            configure = Configure(
                PROTOCOL_VERSION,
                index + 1,
                model,
                layers.start,
                layers.end,
                dtype,
                addresses[index + 1] if index + 1 < len(addresses) else None,
                self._config.heartbeat_s,
                emulation,
                hints,
                self._config.int8_wire,
                weights,
            )
            self._configures.append(configure)
            connection.send(configure)

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        """Each has loaded its stage by then, and reached the next worker."""
        loaded = dict.fromkeys(range(1, len(self._controls) + 1), 0.0)
        ready: dict[int, Ready] = {}
        last_news = dict.fromkeys(loaded, time.monotonic())  # of each worker on its own
        patience_s = max(_BUSY_PATIENCE_S, 4 * self._config.heartbeat_s)  # a driver that was killed is missed after 3
        busy, busy_until_s = dict[int, float](), time.monotonic() + patience_s
        while len(ready) < len(self._controls):
            for stage, message in self._receive(0.2):
                match message:
                    case Loading():
                        loaded[stage], last_news[stage] = message.fraction, time.monotonic()
                    case Ready():
                        loaded[stage], ready[stage] = 1.0, message
                    case Busy():
                        busy[stage] = last_news[stage] = time.monotonic()
                        if busy[stage] > busy_until_s:
                            raise WorkerError(f"{self._name(stage)} is busy: {message.reason}")
                    case _:
                        last_news[stage] = time.monotonic()
                progress(sum(loaded.values()) / len(loaded))
            self._ask_again(busy)
            self._check_news(last_news, ready)
        return [ready[stage] for stage in sorted(ready)]

    def _ask_again(self, busy: dict[int, float]) -> None:
        """A worker may not have heard yet that the driver before has ended. ``busy``: since when, by stage."""
        for stage in [stage for stage, told_s in busy.items() if time.monotonic() - told_s > _ASK_INTERVAL_S]:
            del busy[stage]
            self._controls[stage - 1].send(self._configures[stage - 1])

    def _name(self, stage: int) -> str:
        return f"worker {stage} ({self._controls[stage - 1].address})"

    def _check_news(self, last_news: Mapping[int, float], ready: Mapping[int, Ready]) -> None:
        """Each worker has a deadline of its own: what others say is no sign of it."""
        deadline = time.monotonic() - self._config.start_timeout_s
        silent = [stage for stage, news_s in last_news.items() if stage not in ready and news_s < deadline]
        if not silent:
            return
        names = ", ".join(map(self._name, silent))
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
        """As ``Connections.receive``; a worker's failure, or its loss, is raised as the error that it is."""
        return [message for _, message in self._receive(timeout_s)]

    def _receive(self, timeout_s: float) -> list[tuple[int, ToDriver]]:
        """With the stage that sent it."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._woken_end.fileno() in ready:
            self._woken_end.recv(4096)
        received: list[tuple[int, ToDriver]] = []
        for index, connection in enumerate(self._controls, start=1):
            while (arrived := self._read(connection, index)) is not None:
                message, num_bytes = arrived
                self._num_bytes += num_bytes
                if isinstance(message, Echo):
                    self._note_echo(index, message)
                else:
                    received.append((index, _raise_failure(message, index, connection.address)))
        if timeout_s > 0 or time.monotonic() - self._last_check > _CHECK_INTERVAL_S:
            self._check_workers()
        return received

    def _read(self, connection: Connection, stage: int) -> tuple[ToDriver, int] | None:
        """A message that may be believed."""
        try:
            if (arrived := connection.receive()) is not None and self._replies is not None:
                self._replies.check(arrived[0], stage)
        except ProtocolError as error:
            raise ProtocolError(
                f"worker {stage} ({connection.address}) breaks the protocol: {error}; install the same flowspec "
                "version on both, and let nobody else at that address"
            ) from None
        return arrived

    def probe(self) -> None:
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
        self._launcher.check()
        for index, connection in enumerate([*self._controls, self._data]):
            connection.check()
            if connection.is_lost:
                worker = f"worker {index + 1 if index < len(self._controls) else 1}"
                raise WorkerError(f"lost {worker} ({connection.address}); the run cannot go on without it")

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: a call is on its way already; closed: nobody waits
            self._wake_end.send(b"w")

    def close(self) -> None:
        for connection in self._controls:
            connection.send(Stop())
            connection.close(linger_s=0.5)
        if hasattr(self, "_data"):
            self._data.close()
        self._context.term()
        self._wake_end.close()
        self._woken_end.close()
        self._launcher.close()


def _raise_failure(message: ToDriver, index: int, address: str) -> ToDriver:
    match message:
        case Failure():
            logger.debug("worker %d: %s", index, message.traceback)
            error: type[FlowspecError] = UsageError if message.user_error else WorkerError
            raise error(message.text if message.user_error else f"worker {index} ({address}) failed: {message.text}")
        case _:
            return message
