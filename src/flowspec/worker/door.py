"""Where a worker listens, and who is let in."""

from __future__ import annotations

from typing import Any, NamedTuple

import zmq

from flowspec.errors import UsageError, require
from flowspec.wire.curve import Gate, KeyPair
from flowspec.wire.messages import Configure
from flowspec.wire.transport import Listener, Sender


class Keys(NamedTuple):
    """Of a device that has joined a driver's cluster."""

    own: KeyPair
    driver: str


class Door:
    """Without keys open to anybody; with them to the driver, and during a session to the worker before."""

    def __init__(self, context: zmq.Context[Any], address: str, heartbeat_s: float, keys: Keys | None) -> None:
        """Raises ``UsageError`` when the address cannot be bound."""
        self._keys = keys
        self._gate = None if keys is None else Gate(context, keys.driver)
        try:
            self.listener = Listener(context, address, heartbeat_s, None if keys is None else keys.own)
        except BaseException:
            self._close_gate()
            raise

    def check_driver(self, sender: Sender) -> None:
        """Raises ``ProtocolError`` for somebody else who was let in."""
        require(self._keys is None or sender.key == self._keys.driver, "it is another worker's, and begins no session")

    def open_for(self, configure: Configure) -> None:
        """Let in the worker before, as the driver names it."""
        if self._gate is not None and configure.previous_key is not None:
            self._gate.allowed |= {configure.previous_key}

    def shut(self) -> None:
        """Let in the driver alone: the session is over."""
        if self._gate is not None and self._keys is not None:
            self._gate.allowed = frozenset([self._keys.driver])

    def keys_to_next(self, configure: Configure) -> tuple[KeyPair, str] | None:
        """Both ends' of the connection to the next worker. Raises ``UsageError`` where only this one has joined."""
        if self._keys is None:
            return None
        if configure.next_key is None:
            raise UsageError(f"{configure.next_address} has not joined, and the worker before it has; let all join")
        return self._keys.own, configure.next_key

    def close(self) -> None:
        self.listener.close(linger_s=1.0)
        self._close_gate()

    def _close_gate(self) -> None:
        if self._gate is not None:
            self._gate.close()
