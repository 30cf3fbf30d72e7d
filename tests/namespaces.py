"""A small network for tests: namespaces on one switch, each link as slow as it is told. Needs root and iproute2."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

_NUMBERS = itertools.count()
_INSIDE = ("ip", "netns", "exec")
_WITHOUT = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')


def why_not() -> str | None:
    """Why no network can be made here; ``None``: it can."""
    if not all(map(shutil.which, ("ip", "tc", "mount", "unshare"))):
        return "iproute2 is not installed"
    name = f"fs{os.getpid()}probe"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "exec", name, "unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt")
        _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", "tbf", *_shape(100))
    except OSError as error:
        return f"no network namespaces: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)
    return None


class Network:
    """Place 0 holds the switch; all are 10.71.0.1, 10.71.0.2, ... Nothing of it is left after ``close``."""

    def __init__(self, num_places: int, mbps: float) -> None:
        prefix = f"fs{os.getpid()}x{next(_NUMBERS)}"
        self._names = [f"{prefix}n{place}" for place in range(num_places)]
        self._mbps = mbps
        try:
            for place, name in enumerate(self._names):
                _run("ip", "netns", "add", name)
                self._ip(place, "link", "set", "lo", "up")
            self._ip(0, "link", "add", "switch", "type", "bridge")
            self._ip(0, "addr", "add", f"{self.address(0)}/24", "dev", "switch")
            self._ip(0, "link", "set", "switch", "up")
            for place in range(1, num_places):
                self._plug_in(place)
        except BaseException:
            self.close()
            raise

    def _plug_in(self, place: int) -> None:
        port = f"port{place}"
        self._ip(0, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self._names[place])
        self._ip(0, "link", "set", port, "master", "switch")
        self._ip(place, "addr", "add", f"{self.address(place)}/24", "dev", "eth0")
        for where, device in ((0, port), (place, "eth0")):
            self._ip(where, "link", "set", device, "up")
            _run(*self.inside(where), "tc", "qdisc", "add", "dev", device, "root", "tbf", *_shape(self._mbps))

    def address(self, place: int) -> str:
        return f"10.71.0.{place + 1}"

    def inside(self, place: int) -> list[str]:
        """Before a command: it runs there."""
        return [*_INSIDE, self._names[place]]

    def inside_without(self, place: int, folder: Path) -> list[str]:
        """As ``inside``, and the folder is empty there."""
        return [*self.inside(place), *_WITHOUT, str(folder)]

    def pids(self) -> list[str]:
        """Of all processes in it."""
        return [pid for name in self._names for pid in _run("ip", "netns", "pids", name).split()]

    def move(self, place: int, address: str) -> None:
        """Take its address, and give it another one."""
        self._ip(place, "addr", "flush", "dev", "eth0")
        self._ip(place, "addr", "add", f"{address}/24", "dev", "eth0")

    def set_link(self, place: int, is_up: bool) -> None:
        """As when somebody pulls the plug at the switch, and plugs it in again."""
        self._ip(0, "link", "set", f"port{place}", "up" if is_up else "down")

    def _ip(self, place: int, *arguments: str) -> None:
        _run("ip", "-n", self._names[place], *arguments)

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


def _shape(mbps: float) -> list[str]:
    return ["rate", f"{mbps}mbit", "burst", "64kb", "latency", "200ms"]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


# --- for processes that are forked, and execute nothing ---

_NEW_NETWORK, _NEW_MOUNTS = 0x40000000, 0x00020000  # of setns and unshare
_PRIVATE_BELOW = 0x4000 | 0x40000  # of mount: what is mounted later is nobody else's


def parse(command: list[str]) -> tuple[str | None, str | None, list[str]]:
    """The namespace and the folder of ``Network.inside`` or ``inside_without``, if any, and the rest."""
    if tuple(command[:3]) != _INSIDE:
        return None, None, command
    name, rest = command[3], command[4:]
    if tuple(rest[: len(_WITHOUT)]) != _WITHOUT:
        return name, None, rest
    return name, rest[len(_WITHOUT)], rest[len(_WITHOUT) + 1 :]


def enter(name: str, hidden: str | None) -> None:
    """What the two do, for this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    space = os.open(f"/run/netns/{name}", os.O_RDONLY)
    _check(libc.setns(space, _NEW_NETWORK))
    os.close(space)
    if hidden is not None:
        _check(libc.unshare(_NEW_MOUNTS))
        _check(libc.mount(b"none", b"/", None, _PRIVATE_BELOW, None))
        _check(libc.mount(b"none", os.fsencode(hidden), b"tmpfs", 0, None))


def _check(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
