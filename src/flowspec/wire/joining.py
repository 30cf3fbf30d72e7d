"""How a device joins: one question and one answer, on a connection that proves both ends by the join token.

The device listens with the token's key pair, and lets in the key of the token's driver alone. The driver asks; the
device says its own public key, and its name.
"""

from __future__ import annotations

from typing import Any

import zmq

from flowspec.errors import UsageError
from flowspec.wire.curve import KeyPair, secure_connection, secure_listener
from flowspec.wire.transport import bind, tcp_endpoint

JOIN = b"flowspec-join-1"
MAX_NAME_LEN = 63
_MAX_JOIN_BYTES = 4096  # the frames of the handshake among them


class JoinListener:
    """A device's socket while it waits to join: only the driver of its token is let in."""

    def __init__(self, context: zmq.Context[Any], address: str, own: KeyPair) -> None:
        """``own``: of the token. Raises ``UsageError``."""
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_JOIN_BYTES)
        secure_listener(self._socket, own)
        bind(self._socket, address)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """Whose question, and what it is."""
        if not self._socket.poll(timeout_ms):
            return None
        identity, *frames = self._socket.recv_multipart()
        return identity, b"".join(frames)

    def reply(self, identity: bytes, key: str, name: str) -> None:
        self._socket.send_multipart([identity, key.encode(), name.encode()])

    def close(self, linger_s: float) -> None:
        self._socket.close(linger=int(linger_s * 1000))


def ask_to_join(address: str, own: KeyPair, server_key: str, timeout_s: float) -> tuple[str, str] | None:
    """The key and the name of the device that waits there with the token's key; ``None``: nobody in that time."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.setsockopt(zmq.MAXMSGSIZE, _MAX_JOIN_BYTES)
            secure_connection(socket, own, server_key)
            try:
                socket.connect(tcp_endpoint(address))
            except zmq.ZMQError as error:
                raise UsageError(f"cannot connect to {address}: {error.strerror or error}") from None
            socket.send(JOIN)
            if not socket.poll(int(timeout_s * 1000)):
                return None
            frames = [frame.decode("utf-8", "replace") for frame in socket.recv_multipart()]
    finally:
        context.term()
    if len(frames) != 2 or not frames[1].isprintable() or not 0 < len(frames[1]) <= MAX_NAME_LEN:
        raise UsageError(f"{address} answers something else; install the same flowspec version on both")
    return frames[0], frames[1]
