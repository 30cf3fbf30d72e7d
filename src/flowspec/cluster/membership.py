"""The driver's side of joining: its keys, its token, and the devices that have joined."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zmq

from flowspec.errors import UsageError
from flowspec.wire.curve import JoinToken, KeyPair, Security, is_key
from flowspec.wire.joining import ask_to_join
from flowspec.wire.key_file import read_keys, write_keys
from flowspec.wire.transport import Connection, is_local

logger = logging.getLogger("flowspec.cluster")

_FILE = "driver.json"
TOKEN_LIFETIME_S = 3600.0
_JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Device:
    """That has joined."""

    address: str  # HOST:PORT
    key: str


class Membership:
    """What a driver keeps in ``driver.json``. Devices are known by names, and found by addresses."""

    def __init__(self, path: Path, own: KeyPair, token: JoinToken | None, devices: Mapping[str, Device]) -> None:
        self._path = path
        self.own = own
        self._token = token  # the newest
        self.devices = dict(devices)

    @classmethod
    def open(cls, folder: Path) -> Membership | None:
        """``None`` before ``init``. Raises ``UsageError``."""
        path = folder / _FILE
        if (keys := read_keys(path)) is None:
            return None
        try:
            devices = {str(name): Device(**device) for name, device in keys["devices"].items()}
            if not all(is_key(key) for key in (keys["secret"], *(device.key for device in devices.values()))):
                raise ValueError
            own, token = KeyPair.of(keys["secret"]), None
            if (secret := keys["token"]) is not None and keys["expires_s"] >= time.time():
                token = JoinToken(own.public, secret, keys["expires_s"])
        except (KeyError, TypeError, ValueError, AttributeError, zmq.ZMQError):
            raise UsageError(f"{path} is damaged; delete it, run flowspec cluster init, and join anew") from None
        return cls(path, own, token, devices)

    @classmethod
    def init(cls, folder: Path) -> Membership:
        """A new cluster, unless there is one."""
        membership = cls.open(folder)
        if membership is None:
            membership = cls(folder / _FILE, KeyPair.new(), None, {})
            membership._save()
        return membership

    def _save(self) -> None:
        devices = {name: asdict(device) for name, device in self.devices.items()}
        token, expires_s = (None, 0) if self._token is None else (self._token.secret, self._token.expires_s)
        keys = {"secret": self.own.secret, "token": token, "expires_s": expires_s, "devices": devices}
        write_keys(self._path, keys)

    def new_token(self, lifetime_s: float = TOKEN_LIFETIME_S) -> JoinToken:
        """The only one from now on."""
        self._token = JoinToken(self.own.public, KeyPair.new().secret, int(time.time() + lifetime_s))
        self._save()
        return self._token

    def let_join(self, address: str, timeout_s: float = _JOIN_TIMEOUT_S) -> str:
        """Ask the device that listens there with the token; its name from now on.

        Raises ``UsageError`` where there is no valid token, or nobody who has it.
        """
        if self._token is None or self._token.expires_s < time.time():
            raise UsageError("there is no join token, or it has expired; make one with flowspec cluster token")
        server_key = KeyPair.of(self._token.secret).public
        answer = ask_to_join(address, self.own, server_key, timeout_s)
        if answer is None:
            raise UsageError(
                f"nobody at {address} waits to join with this cluster's token; on that device, run "
                "flowspec worker --join TOKEN (flowspec cluster token prints a new one)"
            )
        key, wanted = answer
        if not is_key(key):
            raise UsageError(f"the device at {address} has sent no key; install the same flowspec version on both")
        self.devices = {name: device for name, device in self.devices.items() if device.address != address}
        name, number = wanted, 2
        while name in self.devices:
            name, number = f"{wanted}-{number}", number + 1
        self.devices[name] = Device(address, key)
        self._save()
        logger.info("%s (%s) has joined", name, address)
        return name

    def remove(self, name: str) -> None:
        """Raises ``UsageError`` for a name that no device has."""
        if name not in self.devices:
            raise UsageError(f"no device is called {name!r}; there are: {', '.join(self.devices) or 'none'}")
        del self.devices[name]
        self._save()

    def rotate(self) -> None:
        """New keys: no device believes this driver any more, and no token is valid. All have to join again."""
        self.own, self._token, self.devices = KeyPair.new(), None, {}
        self._save()

    @property
    def keys(self) -> dict[str, str]:
        """Of the devices, by address."""
        return {device.address: device.key for device in self.devices.values()}

    def security(self, addresses: Sequence[str]) -> Security:
        """For a session with these devices; those that wait to join do so now. Raises ``UsageError``."""
        for address in addresses:
            if address not in self.keys:
                self.let_join(address)
        return Security(self.own, self.keys)


def answers(membership: Membership, device: Device, timeout_s: float = 2.0) -> bool:
    """Whether somebody with the device's key listens at its address, and lets this driver in."""
    context: zmq.Context[Any] = zmq.Context()
    connection = Connection(context, device.address, "status", "control", timeout_s, keys=(membership.own, device.key))
    try:
        until_s = time.monotonic() + timeout_s
        while not connection.is_up and time.monotonic() < until_s:
            time.sleep(0.02)
            connection.check()
        return connection.is_up
    finally:
        connection.close()
        context.term()


def security_of(addresses: Sequence[str], folder: Path, insecure: bool) -> Security | None:
    """How a driver connects to workers that run elsewhere; ``None``: without keys.

    That is for addresses of this machine alone, unless the user wants it. Raises ``UsageError``.
    """
    if insecure:
        if not all(map(is_local, addresses)):
            logger.warning("warning: connections are neither encrypted nor authenticated")
        return None
    membership = Membership.open(folder)
    known = {} if membership is None else membership.keys
    if all(is_local(address) and address not in known for address in addresses):
        return None
    if membership is None:
        raise UsageError(
            "workers on other machines have to join first: flowspec cluster init prints a token for "
            "flowspec worker --join; or give --insecure here and there, in a network that you trust"
        )
    return membership.security(addresses)
