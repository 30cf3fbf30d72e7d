"""CurveZMQ (rfc.zeromq.org/spec/26): both ends of a connection prove by keys who they are, and all on it is encrypted.

A listener has one key pair and a ``Gate``, which names the keys that may connect. Others are refused in the handshake,
before any byte of theirs is decoded. Keys are written as Z85, 40 characters.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from flowspec.errors import UsageError

_DOMAIN = "flowspec"
_TOKEN = "flowspec1-"
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_TOKEN_FORM = struct.Struct(">32s32sI")


def is_key(text: object) -> bool:
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


@dataclass(frozen=True)
class KeyPair:
    public: str
    secret: str

    @classmethod
    def new(cls) -> KeyPair:
        """Raises ``UsageError`` where ZeroMQ was built without encryption."""
        if not zmq.has("curve"):
            raise UsageError("this ZeroMQ was built without CURVE; install pyzmq from PyPI, or use --insecure")
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def of(cls, secret: str) -> KeyPair:
        return cls(zmq.curve_public(secret.encode()).decode(), secret)


@dataclass(frozen=True)
class Security:
    """What a driver proves itself by, and the keys that prove its workers, by their addresses."""

    own: KeyPair
    keys: Mapping[str, str]


@dataclass(frozen=True)
class JoinToken:
    """What a device needs to join a driver's cluster: whom it may believe, and by what it is believed itself.

    ``secret``: of the key pair of a listener that does nothing but join, until the time ``expires_s``.
    """

    driver_key: str
    secret: str
    expires_s: int  # since 1970

    def __str__(self) -> str:
        packed = _TOKEN_FORM.pack(z85.decode(self.driver_key), z85.decode(self.secret), self.expires_s)
        return _TOKEN + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @property
    def listener_key(self) -> str:
        """The public one, by which a device that waits to join proves itself."""
        return KeyPair.of(self.secret).public

    @property
    def has_expired(self) -> bool:
        return self.expires_s < time.time()

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises ``UsageError`` for what is no token; one that has expired is one."""
        try:
            if not text.startswith(_TOKEN):
                raise ValueError
            body = text.removeprefix(_TOKEN)
            packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            driver_key, secret, expires_s = _TOKEN_FORM.unpack(packed)
        except (ValueError, binascii.Error, struct.error):
            raise UsageError("the join token is not all of one; copy what flowspec cluster token prints") from None
        return cls(z85.encode(driver_key).decode(), z85.encode(secret).decode(), expires_s)


class Gate:
    """Who may connect to the listeners of a context; a thread of its own answers, whatever the others are busy with."""

    def __init__(self, context: zmq.Context[Any], *allowed: str) -> None:
        self.allowed = frozenset(allowed)  # replaced as a whole: another thread reads it
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=_DOMAIN, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """What ``zmq.auth`` asks."""
        return key.decode("ascii", "replace") in self.allowed

    def close(self) -> None:
        """Safe to call twice."""
        if self._authenticator.is_alive():
            self._authenticator.stop()


def secure_listener(socket: zmq.Socket[bytes], own: KeyPair) -> None:
    """Before it is bound, and in a context with a ``Gate``."""
    socket.curve_server = True
    socket.curve_secretkey = own.secret.encode()
    socket.curve_publickey = own.public.encode()
    socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)


def secure_connection(socket: zmq.Socket[bytes], own: KeyPair, server_key: str) -> None:
    """Before it is connected."""
    socket.curve_serverkey = server_key.encode()
    socket.curve_secretkey = own.secret.encode()
    socket.curve_publickey = own.public.encode()
