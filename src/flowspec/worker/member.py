"""A device's side of joining: its own keys, and the driver that it works for."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

import zmq

from flowspec.errors import UsageError
from flowspec.wire.curve import Gate, JoinToken, KeyPair, is_key
from flowspec.wire.joining import JOIN, MAX_NAME_LEN, JoinListener
from flowspec.wire.key_file import read_keys, write_keys

logger = logging.getLogger("flowspec.worker")

_FILE = "worker.json"
_POLL_MS = 200
_LINGER_S = 2.0  # in which the answer leaves


class Member:
    """What a device keeps in ``worker.json``: it has joined a driver's cluster, or is about to."""

    def __init__(self, path: Path, own: KeyPair, driver_key: str, token: JoinToken | None) -> None:
        """``token``: what it is to join by."""
        self._path = path
        self.own = own
        self.driver_key = driver_key
        self._token = token

    @classmethod
    def open(cls, folder: Path) -> Member | None:
        """``None`` where it never was to join any. Raises ``UsageError``, also where its token has expired unused."""
        path = folder / _FILE
        if (keys := read_keys(path)) is None:
            return None
        secret, driver_key, token = str(keys.get("secret")), str(keys.get("driver")), keys.get("token")
        if not (is_key(secret) and is_key(driver_key) and (token is None or isinstance(token, str))):
            raise UsageError(f"{path} is damaged; delete it, and join anew")
        return cls(path, KeyPair.of(secret), driver_key, None if token is None else JoinToken.parse(token))

    @classmethod
    def join(cls, folder: Path, text: str) -> Member:
        """As a token says; its own keys are new, and whatever it had joined before is forgotten."""
        token = JoinToken.parse(text)
        member = cls(folder / _FILE, KeyPair.new(), token.driver_key, token)
        member._save()
        return member

    def _save(self) -> None:
        token = None if self._token is None else str(self._token)
        write_keys(self._path, {"secret": self.own.secret, "driver": self.driver_key, "token": token})

    def await_driver(self, address: str, name: str) -> str:
        """Return once the driver has this device's key: at once, where it has joined already; the address it has.

        Raises ``UsageError`` when the token expires first, and for what is no address.
        """
        if self._token is None:
            return address
        context: zmq.Context[Any] = zmq.Context()
        gate = Gate(context, self.driver_key)
        try:
            listener = JoinListener(context, address, KeyPair.of(self._token.secret))
            try:
                logger.info("listening on %s, for the driver to let this device join as %s", listener.endpoint, name)
                self._answer(listener, name)
                address = listener.endpoint
            finally:
                listener.close(_LINGER_S)
        finally:
            gate.close()
            context.term()
        self._token = None
        self._save()
        logger.info("joined")
        return address

    def _answer(self, listener: JoinListener, name: str) -> None:
        assert self._token is not None
        while time.time() <= self._token.expires_s:
            asked = listener.receive(_POLL_MS)
            if asked is not None and asked[1] == JOIN:
                listener.reply(asked[0], self.own.public, name)
                return
        raise UsageError("the join token has expired; make a new one with flowspec cluster token")


def device_name(name: str | None) -> str:
    """As given, or the machine's own. Raises ``UsageError``."""
    name = name or socket.gethostname()
    if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_LEN:
        raise UsageError(f"a device's name has 1 to {MAX_NAME_LEN} printable characters")
    return name
