"""Workers in a local network: announced by mDNS (RFC 6762, 6763), and heard.

Whoever is in the network may announce whatever he likes: nothing here is believed, and who uses what was heard proves
it by keys (``cluster.discovery``).
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ifaddr
from zeroconf import DNSQuestionType, Error, IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from flowspec.errors import UsageError, first_line
from flowspec.wire.curve import is_key
from flowspec.wire.joining import MAX_NAME_LEN
from flowspec.wire.messages import PROTOCOL_VERSION

logger = logging.getLogger("flowspec.cluster")

SERVICE = "_flowspec._tcp.local."
BROWSE_S = 3.0
MAX_SERVICES = 512  # that are looked at in one go
MAX_ADDRESSES = 8  # of one worker
_MAX_VERSION_LEN = 6
_RESOLVE_S = 1.0  # for those whose addresses did not come by themselves
_POLL_S = 0.1
_WATCH_S = 5.0  # between two looks at this device's own addresses
_ANYWHERE = "0.0.0.0"


@dataclass(frozen=True)
class Announcement:
    """What somebody says of a worker."""

    name: str
    version: int  # of the protocol
    key: str  # public: of the device, or, while it waits to join, of its token's listener
    is_waiting: bool
    addresses: tuple[str, ...]  # HOST:PORT

    @classmethod
    def of(cls, values: Mapping[bytes, bytes | None], hosts: Sequence[str], port: int | None) -> Announcement | None:
        """``None`` for what no worker says."""
        name, version, key = (_text(values.get(field)) for field in (b"name", b"protocol", b"key"))
        is_name = name.isprintable() and 0 < len(name.encode()) <= MAX_NAME_LEN
        is_version = version.isascii() and version.isdecimal() and len(version) <= _MAX_VERSION_LEN
        found = [f"{host}:{port}" for host in dict.fromkeys(hosts) if _is_host(host)][:MAX_ADDRESSES]
        if not (is_name and is_version and is_key(key) and found and port and 0 < port < 2**16):
            return None
        return cls(name, int(version), key, values.get(b"state") == b"joins", tuple(found))

    @property
    def values(self) -> dict[bytes, bytes | None]:
        """As its TXT record holds them."""
        state = b"joins" if self.is_waiting else b"works"
        version = str(self.version).encode()
        return {b"protocol": version, b"name": self.name.encode(), b"key": self.key.encode(), b"state": state}


def _text(value: bytes | None) -> str:
    """Empty for what is no UTF-8."""
    try:
        return (value or b"").decode()
    except UnicodeDecodeError:
        return ""


def _is_host(host: str) -> bool:
    """Whether one machine may have this IPv4 address."""
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return not (address.is_multicast or address.is_unspecified or address.is_reserved)


def own_addresses() -> list[str]:
    """IPv4 addresses that others may reach this machine by; those that it gave itself come last."""
    found = {str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4}
    addresses = [address for address in map(ipaddress.IPv4Address, found) if not address.is_loopback]
    return [str(address) for address in sorted(addresses, key=lambda one: (one.is_link_local, one))]


class Announcer:
    """Says where a worker of this device listens, until it is closed; anew when the device's addresses change."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: tuple[str, str, bool] | None = None
        self._hosts: list[str] = []  # that it is said for
        self._zeroconf: Zeroconf | None = None
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._watcher: threading.Thread | None = None

    def say(self, endpoint: str, key: str, is_waiting: bool) -> None:
        """Instead of what it has said before. ``endpoint``: as ZeroMQ tells it. Raises ``UsageError``."""
        with self._lock:
            self._said = endpoint, key, is_waiting
            if not self._hosts_of(endpoint):
                raise UsageError("this machine has no network to be found in; leave --discover out")
            try:
                self._announce()
            except (OSError, RuntimeError, Error) as error:
                raise UsageError(
                    f"this worker cannot be announced by mDNS ({first_line(error)}); leave --discover out, and name "
                    "its address on the driver"
                ) from error
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="announcer", daemon=True)
            self._watcher.start()

    def _hosts_of(self, endpoint: str) -> list[str]:
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        return own_addresses() if host == _ANYWHERE else [host]

    def _announce(self) -> None:
        assert self._said is not None, "there is something to say"
        endpoint, key, is_waiting = self._said
        hosts = self._hosts_of(endpoint)
        self._fall_silent()
        if not hosts:
            return
        zeroconf = Zeroconf(interfaces=hosts, ip_version=IPVersion.V4Only)
        try:
            port = int(endpoint.rpartition(":")[2])
            said = Announcement(self._name, PROTOCOL_VERSION, key, is_waiting, ())
            # A label of its own for each run: nobody can hold it before, and no older record goes by it.
            label = secrets.token_hex(8)
            info = ServiceInfo(
                SERVICE,
                f"{label}.{SERVICE}",
                port,
                properties=said.values,
                server=f"{label}.local.",
                parsed_addresses=hosts[:MAX_ADDRESSES],
            )
            zeroconf.register_service(info, cooperating_responders=True)
        except BaseException:
            zeroconf.close()
            raise
        self._zeroconf, self._hosts = zeroconf, hosts

    def _fall_silent(self) -> None:
        self._hosts = []
        if self._zeroconf is not None:
            self._zeroconf.close()
            self._zeroconf = None

    def _watch(self) -> None:
        """A laptop gets another address, or has none for a while."""
        level = logging.WARNING
        while not self._is_over.wait(_WATCH_S):
            with self._lock:
                if self._said is None or self._is_over.is_set() or self._hosts_of(self._said[0]) == self._hosts:
                    continue
                try:
                    self._announce()
                    logger.info("announced at %s", ", ".join(self._hosts) or "no address: there is no network")
                    level = logging.WARNING
                except (OSError, RuntimeError, Error) as error:
                    logger.log(level, "this worker is not announced at present: %s", first_line(error))
                    level = logging.DEBUG  # it is tried again

    def close(self) -> None:
        """Safe to call twice."""
        self._is_over.set()
        with self._lock:
            self._fall_silent()
        if self._watcher is not None:
            self._watcher.join()


def browse(seconds: float = BROWSE_S, interfaces: Sequence[str] | None = None) -> list[Announcement]:
    """What is heard in that time. ``interfaces``: addresses of this machine; all, by default, but loopback ones.

    Raises ``UsageError``.
    """
    hosts = own_addresses() if interfaces is None else list(interfaces)
    if not hosts:
        raise UsageError("this machine has no network to find devices in; name their addresses with --workers")
    try:
        with Zeroconf(interfaces=hosts, ip_version=IPVersion.V4Only) as zeroconf:
            return list(_heard(zeroconf, seconds))
    except (OSError, RuntimeError, Error) as error:
        raise UsageError(
            f"mDNS cannot be listened to ({first_line(error)}); name the devices' addresses with --workers"
        ) from error


def _heard(zeroconf: Zeroconf, seconds: float) -> Iterator[Announcement]:
    names: dict[str, bool] = {}  # whether it is still there

    def note(*, name: str, state_change: ServiceStateChange, **_: Any) -> None:
        if name in names or len(names) < MAX_SERVICES:
            names[name] = state_change is not ServiceStateChange.Removed

    # Answers to all: one to this address alone goes to whoever else listens to mDNS on this machine, as avahi does.
    browser = ServiceBrowser(zeroconf, SERVICE, handlers=[note], question_type=DNSQuestionType.QM)
    try:
        _wait(seconds, lambda: len(names) == MAX_SERVICES)
    finally:
        browser.cancel()
    until_s = time.monotonic() + _RESOLVE_S
    for name in [name for name, is_there in names.items() if is_there]:
        if (found := _resolve(zeroconf, name, until_s - time.monotonic())) is not None:
            yield found


def _wait(seconds: float, is_over: Callable[[], bool]) -> None:
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0 and not is_over():
        time.sleep(min(left_s, _POLL_S))


def _resolve(zeroconf: Zeroconf, name: str, left_s: float) -> Announcement | None:
    try:
        info = ServiceInfo(SERVICE, name)
        is_whole = info.load_from_cache(zeroconf) or (
            left_s > 0 and info.request(zeroconf, int(1000 * left_s), DNSQuestionType.QM)
        )
    except Error:  # what is no name
        return None
    return Announcement.of(info.properties, info.parsed_addresses(IPVersion.V4Only), info.port) if is_whole else None
