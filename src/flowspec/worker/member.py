"""A device's side of joining: its own keys, and the driver that it works for."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
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

    def __init__(
        self, path: Path, own: KeyPair, driver_key: str, token: JoinToken | None, joined_by: str | None = None
    ) -> None:
        """``token``: what it is to join by. ``joined_by``: the listener's key of the token that it has joined by."""
        self._path = path
        self.own = own
        self.driver_key = driver_key
        self._token = token
        self._joined_by = joined_by

    @classmethod
    def open(cls, folder: Path) -> Member | None:
        """``None`` where it never was to join any. Raises ``UsageError``, also where its token has expired unused."""
        path = folder / _FILE
        if (keys := read_keys(path)) is None:
            return None
        secret, driver_key, token = str(keys.get("secret")), str(keys.get("driver")), keys.get("token")
        if not (is_key(secret) and is_key(driver_key) and (token is None or isinstance(token, str))):
            raise UsageError(f"{path} is damaged; delete it, and join anew")
        waiting = None if token is None else _valid(JoinToken.parse(token))
        return cls(path, KeyPair.of(secret), driver_key, waiting, keys.get("joined_by"))

    @classmethod
    def join(cls, folder: Path, text: str) -> Member:
        """As a token says; its own keys are new, and whatever it had joined before is forgotten.

        A token that it has joined by, or waits with, changes nothing: a service may be given one at every start.
        """
        token, before = JoinToken.parse(text), None
        with contextlib.suppress(UsageError):  # damaged keys make way
            before = cls.open(folder)
        if before is not None and (before._token == token or before._joined_by == token.listener_key):
            return before
        member = cls(folder / _FILE, KeyPair.new(), token.driver_key, _valid(token))
        member._save()
        return member

    def _save(self) -> None:
        token = None if self._token is None else str(self._token)
        keys = {"secret": self.own.secret, "driver": self.driver_key, "token": token, "joined_by": self._joined_by}
        write_keys(self._path, keys)

    @property
    def waits_with(self) -> str | None:
        """The listener's key of the token that it is to join by; ``None``: it has joined."""
        return None if self._token is None else self._token.listener_key

    def await_driver(self, address: str, name: str, on_listening: Callable[[str], None] = lambda endpoint: None) -> str:
        """Return once the driver has this device's key: at once, where it has joined already; the address it has.

        ``on_listening``: is told the endpoint where it waits. Raises ``UsageError`` when the token expires first, and
        for what is no address.
        """
        if self._token is None:
            return address
        context: zmq.Context[Any] = zmq.Context()
        gate = Gate(context, self.driver_key)
        try:
            listener = JoinListener(context, address, KeyPair.of(self._token.secret))
            try:
                logger.info("listening on %s, for the driver to let this device join as %s", listener.endpoint, name)
                on_listening(listener.endpoint)
                self._answer(listener, name)
                address = listener.endpoint
            finally:
                listener.close(_LINGER_S)
        finally:
            gate.close()
            context.term()
        self._token, self._joined_by = None, self._token.listener_key
        self._save()
        logger.info("joined")
        return address

    def _answer(self, listener: JoinListener, name: str) -> None:
        assert self._token is not None
        while not self._token.has_expired:
            asked = listener.receive(_POLL_MS)
            if asked is not None and asked[1] == JOIN:
                listener.reply(asked[0], self.own.public, name)
                return
        _valid(self._token)


def _valid(token: JoinToken) -> JoinToken:
    """Raises ``UsageError`` for one that is no longer."""
    if token.has_expired:
        raise UsageError("the join token has expired; make a new one with flowspec cluster token")
    return token


def device_name(name: str | None) -> str:
    """As given, or the machine's own. Raises ``UsageError``."""
    name = name or socket.gethostname()
    if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_LEN:
        raise UsageError(f"a device's name has 1 to {MAX_NAME_LEN} printable characters")
    return name
