"""The driver's side of joining: its keys, its token, and the devices that have joined."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import zmq

from flowspec.config import DEVICES_OF_A_TOKEN
from flowspec.errors import UsageError
from flowspec.wire.curve import JoinToken, KeyPair, Security, is_key
from flowspec.wire.joining import ask_to_join
from flowspec.wire.key_file import held, read_keys, write_keys
from flowspec.wire.transport import Connection, is_local

logger = logging.getLogger("flowspec.cluster")

_FILE = "driver.json"
TOKEN_LIFETIME_S = 3600.0
_JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Device:
    """That has joined."""

    address: str  # HOST:PORT; empty where another device has been found since
    key: str


class Membership:
    """What a driver keeps in ``driver.json``. Devices are known by names, and found by addresses.

    Several processes may change it: each change begins with what the file says by then.
    """

    def __init__(self, path: Path) -> None:
        """Use ``open`` or ``init`` to get one."""
        self._path = path
        self.own = KeyPair("", "")
        self.token: JoinToken | None = None  # the newest
        self._num_left = 0  # devices that it may let in
        self.devices: dict[str, Device] = {}

    @classmethod
    def open(cls, folder: Path) -> Membership | None:
        """``None`` before ``init``. Raises ``UsageError``."""
        membership = cls(folder / _FILE)
        return membership if membership._read() else None

    @classmethod
    def init(cls, folder: Path) -> Membership:
        """A new cluster, unless there is one."""
        membership = cls(folder / _FILE)
        with membership._changing():
            if not membership.own.secret:
                membership.own = KeyPair.new()
        return membership

    def _read(self) -> bool:
        """Whether there is a file. Raises ``UsageError``."""
        if (keys := read_keys(self._path)) is None:
            return False
        try:
            devices = {str(name): Device(**device) for name, device in keys["devices"].items()}
            if not all(is_key(key) for key in (keys["secret"], *(device.key for device in devices.values()))):
                raise ValueError
            own, token, num_left = KeyPair.of(keys["secret"]), None, keys.get("num_left", DEVICES_OF_A_TOKEN)
            if (secret := keys["token"]) is not None:
                token = JoinToken(own.public, secret, int(keys["expires_s"]))
            if not (isinstance(num_left, int) and (token is None or is_key(token.secret))):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, zmq.ZMQError):
            raise UsageError(f"{self._path} is damaged; delete it, run flowspec cluster init, and join anew") from None
        self.own, self.token, self._num_left, self.devices = own, token, num_left, devices
        return True

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with held(self._path):
            self._read()
            yield
            devices = {name: asdict(device) for name, device in self.devices.items()}
            token, expires_s = (None, 0) if self.token is None else (self.token.secret, self.token.expires_s)
            keys = {"secret": self.own.secret, "token": token, "expires_s": expires_s, "num_left": self._num_left}
            write_keys(self._path, {**keys, "devices": devices})

    def new_token(self, lifetime_s: float = TOKEN_LIFETIME_S, num_devices: int = DEVICES_OF_A_TOKEN) -> JoinToken:
        """The only one from now on; so many devices may join by it."""
        with self._changing():
            token = JoinToken(self.own.public, KeyPair.new().secret, int(time.time() + lifetime_s))
            self.token, self._num_left = token, num_devices
        return token

    def check_token(self) -> JoinToken:
        """The one by which devices may join now. Raises ``UsageError`` where there is none."""
        if self.token is None or self.token.has_expired:
            raise UsageError("there is no join token, or it has expired; make one with flowspec cluster token")
        if self._num_left <= 0:
            raise UsageError(
                "the join token has let in as many devices as it was made for; make a new one with flowspec cluster "
                "token (--devices says for how many)"
            )
        return self.token

    def let_join(self, address: str, timeout_s: float = _JOIN_TIMEOUT_S) -> str:
        """Ask the device that listens there with the token; its name from now on.

        Raises ``UsageError`` where there is no valid token, or nobody who has it.
        """
        with self._changing():
            token = self.check_token()
            self._num_left -= 1  # whoever else lets devices in meanwhile counts on
        has_joined = False
        try:
            key, wanted = self._ask(address, token, timeout_s)
            has_joined = True
        finally:
            if not has_joined:
                with self._changing():
                    if self.token == token:
                        self._num_left += 1
        with self._changing():
            name = self._add(wanted, Device(address, key))
        logger.info("%s (%s) has joined", name, address)
        return name

    def _ask(self, address: str, token: JoinToken, timeout_s: float) -> tuple[str, str]:
        """The device's key, and what it wants to be called."""
        if (answer := ask_to_join(address, self.own, token.listener_key, timeout_s)) is None:
            raise UsageError(
                f"nobody at {address} waits to join with this cluster's token; on that device, run "
                "flowspec worker --join TOKEN (flowspec cluster token prints a new one)"
            )
        if not is_key(answer[0]):
            raise UsageError(f"the device at {address} has sent no key; install the same flowspec version on both")
        return answer

    def _add(self, wanted: str, device: Device) -> str:
        before = self.devices.get(wanted)
        if before is not None and before.address == device.address:
            del self.devices[wanted]  # it was set up anew
        self._leave(device.address)
        name, number = wanted, 2
        while name in self.devices:
            name, number = f"{wanted}-{number}", number + 1
        self.devices[name] = device
        return name

    def _leave(self, address: str) -> None:
        """Whoever had this address has it no longer."""
        for name, device in self.devices.items():
            if device.address == address:
                self.devices[name] = replace(device, address="")

    def move(self, name: str, device: Device) -> None:
        """A device was found there, and has proved itself by the key that it has joined with."""
        with self._changing():
            if name in self.devices and self.devices[name].key == device.key:
                self._leave(device.address)
                self.devices[name] = device

    def remove(self, name: str) -> None:
        """Raises ``UsageError`` for a name that no device has."""
        with self._changing():
            if name not in self.devices:
                raise UsageError(f"no device is called {name!r}; there are: {', '.join(self.devices) or 'none'}")
            del self.devices[name]

    def rotate(self) -> None:
        """New keys: no device believes this driver any more, and no token is valid. All have to join again."""
        with self._changing():
            self.own, self.token, self._num_left, self.devices = KeyPair.new(), None, 0, {}

    @property
    def keys(self) -> dict[str, str]:
        """Of the devices, by address."""
        return {device.address: device.key for device in self.devices.values() if device.address}

    def security(self, addresses: Sequence[str]) -> Security:
        """For a session with these devices; those that wait to join do so now. Raises ``UsageError``."""
        for address in addresses:
            if address not in self.keys:
                self.let_join(address)
        return Security(self.own, self.keys)


def proven(own: KeyPair, places: Iterable[tuple[str, str]], timeout_s: float) -> set[tuple[str, str]]:
    """Of pairs of an address and a key: where somebody with that key listens, and lets ``own`` in."""
    context: zmq.Context[Any] = zmq.Context()
    session = uuid.uuid4().hex
    connections: dict[tuple[str, str], Connection] = {}
    try:
        for number, place in enumerate(places, start=1):  # two addresses may be one device's
            keys = own, place[1]
            connections[place] = Connection(context, place[0], session, "control", timeout_s, place=number, keys=keys)
        until_s = time.monotonic() + timeout_s
        while not all(one.is_up for one in connections.values()) and time.monotonic() < until_s:
            time.sleep(0.02)
            for connection in connections.values():
                connection.check()
        return {place for place, connection in connections.items() if connection.is_up}
    finally:
        for connection in connections.values():
            connection.close()
        context.term()


def answers(membership: Membership, device: Device, timeout_s: float = 2.0) -> bool:
    """Whether somebody with the device's key listens at its address, and lets this driver in."""
    return bool(device.address and proven(membership.own, [(device.address, device.key)], timeout_s))


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
