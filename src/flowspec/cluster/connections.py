"""The driver's side of all connections to its workers, wherever those run and whoever has started them."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from flowspec.cluster.bring_up import BringUp
from flowspec.cluster.launcher import Launcher
from flowspec.cluster.replies import Replies
from flowspec.cluster.tap_blocks import Blocks, tap_blocks
from flowspec.cluster.trips import Trip, Trips
from flowspec.config import LinkConfig
from flowspec.core import DType, Partition, TapShape, Weights
from flowspec.errors import BusyError, DoesNotFitError, ProtocolError, UsageError, WorkerError
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
    WantChunk,
    WantManifest,
)
from flowspec.wire.transport import Connection

if TYPE_CHECKING:
    from flowspec.cluster.weight_server import WeightServer  # with it comes transformers, which emulations do without

logger = logging.getLogger("flowspec.cluster")

LoadProgress = Callable[[float], None]

_CHECK_INTERVAL_S = 0.1
_READY_POLL_S = 0.2
_LINK_TIMEOUT_S = 20.0  # in which a worker reaches the next one, once both are there
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


class RemoteConnections:
    """Connections to worker processes, local or elsewhere, for one session."""

    def __init__(
        self, launcher: Launcher, config: LinkConfig, replies: Replies | None = None, kind: str = "worker"
    ) -> None:
        """``close`` closes the launcher too, and so does an exception here.

        ``replies``: what workers may say; ``None`` where they are emulated, and this program's own. ``kind``: what
        people call them.
        """
        self._kind = kind
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
        self._trips = Trips()
        self.is_over = False  # the session
        self.bring_up = BringUp(len(launcher.addresses), time.monotonic())
        self._controls: list[Connection] = []
        self._configures: list[Configure] = []  # what each worker is asked for
        self._blocks: Blocks | None = None  # of what they add up for a draft
        self._have_blocks: set[int] = set()  # stages
        self._weights: WeightServer | None = None  # for workers that have not the model
        try:
            for place, address in enumerate(launcher.addresses, start=1):
                self._controls.append(self._connect(address, "control", place))
            self._data = self._connect(launcher.addresses[0], "data")
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str, kind: Any, place: int = 0) -> Connection:
        heartbeat_s = self._config.heartbeat_s
        security = self._launcher.security
        keys = None if security is None else (security.own, security.keys[address])
        connection = Connection(self._context, address, self._session, kind, heartbeat_s, place=place, keys=keys)
        for end in connection.sockets:
            self._poller.register(end, zmq.POLLIN)
        return connection

    @property
    def link_bytes(self) -> int:
        return self._num_bytes

    @property
    def trips(self) -> Mapping[int, Trip]:
        return self._trips.shortest

    def configure(
        self,
        model: str,
        partition: Partition,
        dtype: DType,
        emulation: Emulation | None = None,
        hints: str | None = None,
        weights: Weights = "float",
        taps: TapShape | None = None,
        blocks: Blocks | None = None,
        server: WeightServer | None = None,
        num_best: int = 0,
    ) -> None:
        """Tell every worker which stage to load, whom to pass it on to, what device to play, and where hints are.

        ``taps``: what they add up for a draft, with the ``blocks`` of its first matrix, which they get in time.
        ``server``: of weights, for those who have not the model; it is closed with the session.
        """
        self._weights = server
        addresses, security, self._blocks = self._launcher.addresses, self._launcher.security, blocks
        keys = [None if security is None else security.keys[address] for address in addresses]
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
                taps,
                keys[index + 1] if index + 1 < len(addresses) else None,
                keys[index - 1] if index else None,
                num_best,
            )
            self._configures.append(configure)
            connection.send(configure)

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        """Each has loaded its stage by then, and reached the next worker."""
        patience_s = max(_BUSY_PATIENCE_S, 4 * self._config.heartbeat_s)  # a driver that was killed is missed after 3
        busy_until_s = time.monotonic() + patience_s
        while True:
            try:
                if (ready := self.poll_ready(progress, _READY_POLL_S)) is not None:
                    return ready
            except BusyError as error:  # it may not have heard yet that the driver before has ended
                if time.monotonic() > busy_until_s:
                    raise
                time.sleep(_ASK_INTERVAL_S)
                for stage in error.stages:
                    self._controls[stage - 1].send(self._configures[stage - 1])
            self.check_silent(self.bring_up.silent_since(time.monotonic() - self._config.start_timeout_s))

    def poll_ready(self, progress: LoadProgress, timeout_s: float) -> list[Ready] | None:
        """As ``await_ready``, but for so long; ``None`` when there is still somebody to wait for.

        Raises ``BusyError`` at once.
        """
        busy: dict[int, Busy] = {}
        for stage, message in self._receive(timeout_s):
            if isinstance(message, Busy):
                busy[stage] = message
            elif isinstance(message, WantManifest | WantChunk):
                self._serve(stage, message)
            elif isinstance(message, Loading) and self._blocks is not None and stage not in self._have_blocks:
                self._send_blocks(stage, self._blocks)
            self.bring_up.note(stage, message, time.monotonic())
            progress(self.bring_up.fraction)
        for stage, manifest in self._weights.made().items() if self._weights is not None else ():
            self._controls[stage - 1].send(manifest)
        if busy:
            reasons = "; ".join(f"{self._name(stage)} is busy: {message.reason}" for stage, message in busy.items())
            raise BusyError(reasons, list(busy))
        if (stage := self.bring_up.unlinked_since(time.monotonic() - _LINK_TIMEOUT_S)) is not None:
            address = self._launcher.addresses[stage]
            raise WorkerError(
                f"worker {stage} cannot reach the next worker at {address}; is that its address there, or a firewall "
                "between?",
                [stage],
            )
        return self.bring_up.ready

    def _serve(self, stage: int, message: WantManifest | WantChunk) -> None:
        """Raises ``ModelError``, and ``ProtocolError`` for a worker that asks for what it has no use for."""
        if self._weights is None:
            raise ProtocolError(f"{self._name(stage)} asks for weights, and plays a device")
        if isinstance(message, WantManifest):
            self._weights.want_manifest(stage)
            return
        try:
            self._controls[stage - 1].send(self._weights.chunk(stage, message))
        except ProtocolError as error:
            raise self._broken(stage, error) from None

    def _broken(self, stage: int, error: ProtocolError) -> ProtocolError:
        return ProtocolError(
            f"{self._name(stage)} breaks the protocol: {error}; install the same flowspec version on both, and let "
            "nobody else at that address"
        )

    def _send_blocks(self, stage: int, blocks: Blocks) -> None:
        self._have_blocks.add(stage)
        for part in tap_blocks(self._configures[stage - 1], stage == len(self._configures), blocks):
            self._controls[stage - 1].send(part)

    def _name(self, stage: int) -> str:
        return f"{self._kind} {stage} ({self._controls[stage - 1].address})"

    def check_silent(self, silent: Sequence[int]) -> None:
        """Raises ``WorkerError`` for workers of which there has been no sign for too long.

        Each worker has a deadline of its own: what others say is no sign of it.
        """
        if not silent:
            return
        names = ", ".join(map(self._name, silent))
        are_up = all(self._controls[stage - 1].is_up for stage in silent)
        question = (
            "does it hang while it loads?"
            if are_up
            else "is 'flowspec worker' running there, is the address right, and are its keys those that have joined?"
        )
        raise WorkerError(f"no sign of {names} for {self._config.start_timeout_s:.0f} s; {question}", silent)

    def is_up(self, stage: int) -> bool:
        """Whether its worker's socket has answered, which it does whatever the worker is busy with."""
        return self._controls[stage - 1].is_up

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """On which something may come, as ``watch`` takes them."""
        return [end for connection in (*self._controls, self._data) for end in connection.sockets]

    def watch(self, sockets: Sequence[zmq.Socket[bytes]]) -> None:
        """Let a ``receive`` that waits return when something comes on these, too, whose owner reads it."""
        for end in sockets:
            self._poller.register(end, zmq.POLLIN)

    def unwatch(self, sockets: Sequence[zmq.Socket[bytes]]) -> None:
        """Before they are closed."""
        for end in sockets:
            if end in self._poller:
                self._poller.unregister(end)

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
                    self._trips.note(index, message.clock_s)
                else:
                    received.append((index, self._raise_failure(message, index)))
        if timeout_s > 0 or time.monotonic() - self._last_check > _CHECK_INTERVAL_S:
            self._check_workers()
        return received

    def _raise_failure(self, message: ToDriver, stage: int) -> ToDriver:
        if not isinstance(message, Failure):
            return message
        logger.debug("%s: %s", self._name(stage), message.traceback)
        if message.user_error:
            raise DoesNotFitError(message.text) if message.does_not_fit else UsageError(message.text)
        if message.lost_next:
            raise WorkerError(f"lost worker {stage + 1}, as {self._name(stage)} says", [stage + 1])
        raise WorkerError(f"{self._name(stage)} failed: {message.text}", [stage])

    def _read(self, connection: Connection, stage: int) -> tuple[ToDriver, int] | None:
        """A message that may be believed."""
        try:
            if (arrived := connection.receive()) is not None and self._replies is not None:
                self._replies.check(arrived[0], stage)
        except ProtocolError as error:
            raise self._broken(stage, error) from None
        return arrived

    def probe(self) -> None:
        self._trips.begin()
        for connection in self._controls:
            connection.send(Probe(0, b""))

    def _check_workers(self) -> None:
        self._last_check = time.monotonic()
        self._launcher.check()
        for index, connection in enumerate([*self._controls, self._data]):
            connection.check()
            if connection.is_lost:
                stage = index + 1 if index < len(self._controls) else 1
                raise WorkerError(f"lost {self._name(stage)}", [stage])

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: a call is on its way already; closed: nobody waits
            self._wake_end.send(b"w")

    def end_session(self) -> None:
        """Let the workers go; what was started for them stays. Safe to call twice."""
        if self.is_over:
            return
        self.is_over = True
        if self._weights is not None:
            self._weights.close()
        for connection in self._controls:
            connection.send(Stop())
            connection.close(linger_s=0.0 if connection.is_lost else 0.5)
        if hasattr(self, "_data"):
            self._data.close()
        self._context.term()
        self._wake_end.close()
        self._woken_end.close()

    def close(self) -> None:
        self.end_session()
        self._launcher.close()
