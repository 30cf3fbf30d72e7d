"""How messages travel: queues inside one process, or ZeroMQ between processes and machines. Knows no model.

A worker binds one address. The driver makes two connections to worker 1, one for the data path and one for control,
and a control connection to every other worker; worker i makes a data connection to worker i + 1. Results go back over
the control connection of the last worker, so the driver binds nothing and may sit behind a firewall.

Every connection names its session; a worker listens to one session at a time and drops what belongs to another.
Between machines all are encrypted, and both ends proved by keys (``wire.curve``).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from flowspec.errors import UsageError
from flowspec.wire.actor import Route, Send
from flowspec.wire.codec import Codec
from flowspec.wire.curve import KeyPair, secure_connection, secure_listener
from flowspec.wire.messages import Configure, Message, ToDriver

MAX_MESSAGE_BYTES = 2**28  # of a frame; a peer that sends more is cut off before it is read
_MAX_QUEUED = 4096  # messages of one connection that a worker has not read, or its peer; a stranger's pile up no higher
DRIVER = 0  # the place of the driver; workers are 1, 2, ...

# --- one process ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Link:
    """One direction of one connection between two places; messages on it keep their order."""

    source: int
    target: int
    kind: Literal["control", "data"]


def links_of(route: Route, source: int, num_workers: int) -> list[Link]:
    """That a message of place ``source`` takes: 0 is the driver, workers are 1, 2, ..."""
    match route:
        case Route.NEXT:
            return [Link(source, source + 1, "data")]
        case Route.WORKERS:
            return [Link(source, target, "control") for target in range(1, num_workers + 1)]
        case Route.DRIVER:
            return [Link(source, DRIVER, "control")]


class InprocNetwork:
    """Queues between a driver and its workers. Whoever takes messages decides in which order the links deliver.

    Messages pass the codec, so both ends share no memory and the bytes on the links are the real ones.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.num_bytes = 0
        self._queues: dict[Link, deque[list[bytearray]]] = {}
        self._codec = Codec()

    def post(self, source: int, sends: Iterable[Send]) -> None:
        for send in sends:
            frames = [bytearray(frame) for frame in self._codec.encode(send.message)]
            for link in links_of(send.route, source, self.num_workers):
                self._queues.setdefault(link, deque()).append(frames)

    def waiting(self) -> list[Link]:
        """The links with a message on them, in a fixed order."""
        return sorted(link for link, queue in self._queues.items() if queue)

    def take(self, link: Link) -> Message:
        """The oldest message of a link."""
        frames = self._queues[link].popleft()
        self.num_bytes += sum(len(frame) for frame in frames)
        if link.target == DRIVER:
            return self._codec.decode_to_driver(frames)
        return self._codec.decode_to_worker(frames)


# --- ZeroMQ --------------------------------------------------------------------------------------------------------

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH  # ZeroMQ does not try again
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | _REFUSED
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | _LOST
_RETRY_S = 0.2


def tcp_endpoint(address: str) -> str:
    """``host:port`` (or a ZeroMQ endpoint, as local workers use) as an endpoint. Raises ``UsageError``."""
    if address.startswith(("tcp://", "ipc://")):
        return address
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise UsageError(f"address {address!r} is not HOST:PORT, as in 192.168.1.20:7070")
    return f"tcp://{host}:{port}"


def is_local(address: str) -> bool:
    """Whether an address is of this machine alone."""
    endpoint = tcp_endpoint(address)
    if endpoint.startswith("ipc://"):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def identity_of(session: str, kind: Literal["control", "data"], place: int = 0) -> bytes:
    """Of a connection: a worker listens to two of its session alone. ``place``: of a control connection's other end.

    So a worker that is named twice, in two spellings, can tell its driver.
    """
    return f"{session}:{kind}{place or ''}".encode()


def session_of(identity: bytes) -> str:
    """The session that a connection belongs to."""
    return identity.partition(b":")[0].decode("ascii", "replace")


def _set_common_options(socket: zmq.Socket[bytes], heartbeat_s: float) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 0  # what is in flight is bounded by the schedule
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    heartbeat_ms = int(heartbeat_s * 1000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * heartbeat_ms)  # from a ping on, which may come one heartbeat late


class Connection:
    """One connection to a worker: sends, and on control connections receives; notices when it is lost."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        session: str,
        kind: Literal["control", "data"],
        heartbeat_s: float,
        int8_wire: bool = False,
        place: int = 0,
        keys: tuple[KeyPair, str] | None = None,
    ) -> None:
        """``keys``: this end's, and the worker's public one; ``None``: neither encrypted nor authenticated.

        Raises ``UsageError`` for what is no address; an address where nobody listens, or somebody with another key,
        is found out by waiting.
        """
        self._endpoint = tcp_endpoint(address)
        self.address = address
        self.is_up = False
        self.is_lost = False
        self._socket = context.socket(zmq.DEALER)
        _set_common_options(self._socket, heartbeat_s)
        if keys is not None:
            secure_connection(self._socket, *keys)
        self._socket.setsockopt(zmq.IDENTITY, identity_of(session, kind, place))
        self._socket.reconnect_ivl = 100
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)  # with back-off up to there
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._codec = Codec(int8_wire)
        self._retry_s: float | None = None  # when to connect again, after a refusal
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(f"cannot connect to {address}: {error.strerror or error}") from None

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """What to poll before ``check`` and ``receive``."""
        return [self._socket, self._monitor]

    def send(self, message: Message) -> int:
        """Queue a message; returns its bytes. It is dropped where the other end has refused the connection."""
        frames = self._codec.encode(message)
        with contextlib.suppress(zmq.Again):  # there is no limit to what is queued
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        return sum(len(frame) for frame in frames)

    def receive(self) -> tuple[ToDriver, int] | None:
        """The next message to the driver and its bytes; ``None`` when none is waiting."""
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return self._codec.decode_to_driver([frame.buffer for frame in frames]), sum(len(frame) for frame in frames)

    def check(self) -> None:
        """Read the monitor: sets ``is_up`` once connected, and ``is_lost`` when a connection that was up is gone.

        Who is refused tries again, which ZeroMQ does not: a worker may not know yet whom it is to let in.
        """
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_up = True
            elif event & _LOST and self.is_up:
                self.is_lost = True
            elif event & _REFUSED:
                self._retry_s = time.monotonic() + _RETRY_S
        if self._retry_s is not None and time.monotonic() >= self._retry_s:
            self._retry_s = None
            with contextlib.suppress(zmq.ZMQError):  # it may be gone already
                self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)

    def close(self, linger_s: float = 0.0) -> None:
        """``linger_s``: how long messages that are still queued may take to leave. Safe to call twice."""
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(linger_s * 1000))


class Sender(NamedTuple):
    """Of a message that a listener has received."""

    identity: bytes
    key: str | None  # that has proved it; ``None`` on a listener without keys


def bind(socket: zmq.Socket[bytes], address: str) -> None:
    """Closes the socket, and raises ``UsageError``, for what is no address or cannot be bound."""
    try:
        socket.bind(tcp_endpoint(address))
    except UsageError:
        socket.close()
        raise
    except zmq.ZMQError as error:
        socket.close()
        hint = {errno.EADDRINUSE: "the port is in use; choose another"}.get(
            error.errno or 0, "is it an address of this machine?"
        )
        raise UsageError(f"cannot listen on {address}: {error.strerror or error}; {hint}") from None


class Listener:
    """A worker's bound socket: takes messages of all connections, answers on the drivers' control connections."""

    def __init__(self, context: zmq.Context[Any], address: str, heartbeat_s: float, own: KeyPair | None = None) -> None:
        """``own``: takes only those whom the context's ``Gate`` lets in. Raises ``UsageError`` as ``bind``."""
        self._socket = context.socket(zmq.ROUTER)
        _set_common_options(self._socket, heartbeat_s)
        self._socket.sndhwm = self._socket.rcvhwm = _MAX_QUEUED
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._has_gate = own is not None
        if own is not None:
            secure_listener(self._socket, own)
        # No ROUTER_HANDOVER: a second connection with the name of one that is up is nobody's, and cannot take a session
        # over; and with heartbeats on this side, handover ends the process in an assertion of libzmq.
        self._codec = Codec()
        bind(self._socket, address)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._socket

    @property
    def endpoint(self) -> str:
        """Where it listens, with the port that the system chose for port 0."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self) -> tuple[Sender, list[Any]] | None:
        """The frames and whose they are; ``None`` when nothing is waiting."""
        try:
            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        key = str(identity["User-Id"]) if self._has_gate else None
        return Sender(identity.bytes, key), [frame.buffer for frame in frames]

    def decode(self, frames: list[Any]) -> Message:
        """Raises ``ProtocolError``."""
        return self._codec.decode_to_worker(frames)

    def decode_configure(self, frames: list[Any]) -> Configure:
        """Of somebody who has no session yet. Raises ``ProtocolError``."""
        return self._codec.decode_configure(frames)

    def reply(self, identity: bytes, message: Message) -> bool:
        """Answer on a connection; False when its other end is gone."""
        try:
            self._socket.send_multipart([identity, *self._codec.encode(message)], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        return True

    def close(self, linger_s: float = 0.0) -> None:
        self._socket.close(linger=int(linger_s * 1000))
