"""Devices that are found in the network: what is heard of them, who is believed, and where they are from then on."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from command_line import Run
from flowspec.cluster.device_list import DeviceList
from flowspec.cluster.discovery import find_workers, find_workers_and_draft, let_in, look
from flowspec.cluster.mdns import MAX_ADDRESSES, SERVICE, Announcement, Announcer, browse
from flowspec.cluster.membership import Device, Membership
from flowspec.errors import UsageError
from flowspec.model.demo_pair import demo_directory
from flowspec.wire.curve import KeyPair
from flowspec.wire.key_file import STATE_VARIABLE
from flowspec.wire.messages import PROTOCOL_VERSION
from flowspec.worker.door import Door, Keys
from flowspec.worker.member import Member
from logged_process import LoggedProcess
from machines import environment, network_of
from namespaces import Network

LOOPBACK = ["127.0.0.1"]
KEY = KeyPair.new().public
GOOD: dict[bytes, bytes | None] = {b"protocol": b"10", b"name": b"kitchen", b"key": KEY.encode(), b"state": b"works"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the driver's keys."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "driver"))
    return tmp_path / "driver"


@pytest.fixture(scope="module")
def multicast() -> None:
    """On the loopback interface."""
    announcer = Announcer("probe")
    try:
        announcer.say("tcp://127.0.0.1:9", KEY, False)
        if not browse(2.0, LOOPBACK):
            pytest.skip("no multicast on the loopback interface")
    except UsageError as error:
        pytest.skip(str(error))
    finally:
        announcer.close()


class Joined:
    """A device that listens with its keys, as a worker's process does, and takes no session."""

    def __init__(self, driver_key: str, host: str = "127.0.0.1", own: KeyPair | None = None) -> None:
        self.own = own or KeyPair.new()
        self._context: zmq.Context[Any] = zmq.Context()
        self._door = Door(self._context, f"{host}:0", 1.0, Keys(self.own, driver_key))
        self.endpoint = self._door.listener.endpoint

    @property
    def address(self) -> str:
        return self.endpoint.removeprefix("tcp://")

    def close(self) -> None:
        self._door.close()
        self._context.term()


class Waiting:
    """A device that waits to be let in, in a thread."""

    def __init__(self, folder: Path, token: str, name: str) -> None:
        self.member = Member.join(folder, token)
        self.endpoint = ""
        listens = threading.Event()

        def note(endpoint: str) -> None:
            self.endpoint = endpoint
            listens.set()

        self._thread = threading.Thread(target=self.member.await_driver, args=["127.0.0.1:0", name, note], daemon=True)
        self._thread.start()
        assert listens.wait(20)

    def announcement(self, name: str) -> Announcement:
        key = self.member.waits_with
        assert key is not None
        return Announcement(name, PROTOCOL_VERSION, key, True, (self.endpoint.removeprefix("tcp://"),))

    def end(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def said(name: str, key: str, *addresses: str, version: int = PROTOCOL_VERSION) -> Announcement:
    return Announcement(name, version, key, False, addresses)


def put(membership: Membership, **devices: Device) -> None:
    with membership._changing():
        membership.devices.update(devices)


# --- what is heard ---


def test_what_a_worker_says_is_read_as_it_was_written() -> None:
    one = Announcement("küche 1", 7, KEY, True, ("10.0.0.1:7070",))
    assert Announcement.of(one.values, ["10.0.0.1"], 7070) == one
    heard = Announcement.of(GOOD, [f"10.0.0.{n}" for n in range(1, 99)], 80)
    assert heard is not None and len(heard.addresses) == MAX_ADDRESSES and not heard.is_waiting


BAD: dict[str, tuple[dict[bytes, bytes | None], list[str], int | None]] = {
    "nothing": ({}, ["10.0.0.1"], 80),
    "no key": ({**GOOD, b"key": None}, ["10.0.0.1"], 80),
    "half a key": ({**GOOD, b"key": KEY[:39].encode()}, ["10.0.0.1"], 80),
    "a name of control characters": ({**GOOD, b"name": b"a\x1b[2Jb"}, ["10.0.0.1"], 80),
    "a name without end": ({**GOOD, b"name": b"a" * 64}, ["10.0.0.1"], 80),
    "no name": ({**GOOD, b"name": b""}, ["10.0.0.1"], 80),
    "a name that is no UTF-8": ({**GOOD, b"name": b"\xff"}, ["10.0.0.1"], 80),
    "a version that is no number": ({**GOOD, b"protocol": "٣".encode()}, ["10.0.0.1"], 80),
    "a version without end": ({**GOOD, b"protocol": b"9" * 5000}, ["10.0.0.1"], 80),
    "a port that is none": (GOOD, ["10.0.0.1"], 65536),
    "no port": (GOOD, ["10.0.0.1"], None),
    "no address": (GOOD, [], 80),
    "addresses that nobody has": (GOOD, ["0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "x; rm", "1.2.3"], 80),
}


@pytest.mark.parametrize(("values", "hosts", "port"), BAD.values(), ids=BAD)
def test_what_no_worker_says_is_not_heard(
    values: dict[bytes, bytes | None], hosts: list[str], port: int | None
) -> None:
    assert Announcement.of(values, hosts, port) is None


@given(
    st.dictionaries(st.sampled_from([*GOOD]), st.one_of(st.none(), st.binary(max_size=80))),
    st.lists(st.text(max_size=20), max_size=4),
    st.one_of(st.none(), st.integers()),
)
def test_whatever_is_said_breaks_nothing(values: dict[bytes, bytes | None], hosts: list[str], port: int | None) -> None:
    found = Announcement.of({**GOOD, **values}, ["10.0.0.1", *hosts], port)
    assert found is None or (found.name.isprintable() and 0 < len(found.name.encode()) < 64)


@pytest.mark.usefixtures("multicast")
def test_a_worker_is_heard_while_it_is_announced_and_no_longer() -> None:
    """With a stranger beside it, who says nonsense; no thread is left."""
    before = {thread.name for thread in threading.enumerate()}
    announcer = Announcer("küche 1")
    stranger = Zeroconf(interfaces=LOOPBACK, ip_version=IPVersion.V4Only)
    try:
        nonsense = ServiceInfo(
            SERVICE, f"x.{SERVICE}", 80, properties={b"name": b"\x1b[2J"}, parsed_addresses=["127.0.0.1"]
        )
        stranger.register_service(nonsense, cooperating_responders=True)
        announcer.say("tcp://127.0.0.1:7070", KEY, is_waiting=True)
        announcer.say("tcp://127.0.0.1:7071", KEY, is_waiting=False)
        assert browse(2.5, LOOPBACK) == [said("küche 1", KEY, "127.0.0.1:7071")]
    finally:
        announcer.close()
        announcer.close()
        stranger.close()
    assert browse(1.5, LOOPBACK) == []
    assert {thread.name for thread in threading.enumerate()} == before


@pytest.mark.filterwarnings("ignore:unclosed <socket")  # the library's, where it cannot start
def test_where_there_is_no_network_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowspec.cluster.mdns.own_addresses", list)
    with pytest.raises(UsageError, match="no network to find devices in"):
        browse(0.1)
    with pytest.raises(UsageError, match="no network to be found in"):
        Announcer("a").say("tcp://0.0.0.0:7070", KEY, False)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"cannot be listened to \(.*\); name the devices' addresses"):
        browse(0.1, ["203.0.113.7"])  # which is none of this machine
    with pytest.raises(UsageError, match=r"cannot be announced by mDNS \("):
        Announcer("a").say("tcp://203.0.113.7:7070", KEY, False)


# --- who is believed ---


def test_a_device_is_found_where_it_proves_its_key(folder: Path) -> None:
    """And it has that address from then on, whatever others say of it."""
    membership = Membership.init(folder)
    device, other = Joined(membership.own.public), Joined(membership.own.public)
    impostor = Joined(membership.own.public)
    try:
        known = Device("127.0.0.1:9", device.own.public)
        put(membership, attic=known, shed=Device(device.address, KEY))  # as an address that went from one to the other
        fake = [
            said("attic", device.own.public, impostor.address, version=3),
            said("attic", device.own.public, "127.0.0.1:1"),
        ]
        heard = look(membership, [*fake, said("zzz", device.own.public, device.address), said("a", other.own.public)])
        assert heard.found == {"attic": Device(device.address, device.own.public)}
        assert heard.strangers == ["a"] and not heard.waiting
        again = Membership.init(folder)
        assert again.devices == {"attic": heard.found["attic"], "shed": Device("", KEY)}
        assert again.keys == {device.address: device.own.public}
        assert look(membership, fake).found == {}
        assert Membership.init(folder).devices == again.devices
    finally:
        for one in (device, other, impostor):
            one.close()


def test_those_who_have_the_token_join_as_many_as_it_is_for(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    membership = Membership.init(folder)
    token = membership.new_token(lifetime_s=20, num_devices=2)
    waiting = [Waiting(tmp_path / name, str(token), name) for name in ("a", "b")]
    third = Member.join(tmp_path / "c", str(token))
    impostor = Joined(membership.own.public)  # has heard the token's public key, as all do
    try:
        fake = Announcement("a", PROTOCOL_VERSION, token.listener_key, True, (impostor.address,))
        heard = look(membership, [fake, *(one.announcement("x") for one in waiting)], timeout_s=0.5)
        assert len(heard.waiting) == 2
        let_in(membership, heard)
        for one in waiting:
            one.end()
        assert membership.devices.keys() == heard.found.keys() == {"a", "b"}
        assert {device.key for device in membership.devices.values()} == {one.member.own.public for one in waiting}
        late = Announcement("c", PROTOCOL_VERSION, str(third.waits_with), True, ("127.0.0.1:9",))
        assert not look(membership, [late]).waiting, "the token is used up, and nobody is asked any more"
        heard.waiting = [(late, "127.0.0.1:9")]
        let_in(membership, heard)
        assert "as many devices as it was made for" in caplog.text
    finally:
        impostor.close()


def test_a_flood_of_announcements_is_looked_at_in_part(folder: Path) -> None:
    membership = Membership.init(folder)
    device = Joined(membership.own.public)
    try:
        put(membership, attic=Device(device.address, device.own.public))
        flood = [said("attic", device.own.public, *(f"127.1.{n}.{m}:9" for m in range(8))) for n in range(250)]
        token = membership.new_token()
        flood += [Announcement("x", PROTOCOL_VERSION, token.listener_key, True, one.addresses) for one in flood]
        num_files = psutil.Process().num_fds()
        start_s = time.monotonic()
        heard = look(membership, [*flood, said("attic", device.own.public, device.address)], timeout_s=1.0)
        assert heard.found.keys() == {"attic"}, "its last known address is looked at first"
        assert time.monotonic() - start_s < 8 and psutil.Process().num_fds() < num_files + 20
    finally:
        device.close()


# --- what a driver makes of it ---


@pytest.mark.usefixtures("multicast")
def test_devices_are_used_by_name_or_as_a_file_says(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="flowspec cluster init"):
        find_workers(folder, interfaces=LOOPBACK)
    membership = Membership.init(folder)
    with pytest.raises(UsageError, match=r"no device of this cluster was found in 0\.2 s; start flowspec worker"):
        find_workers(folder, seconds=0.2, interfaces=LOOPBACK)
    devices = [Joined(membership.own.public, f"127.0.0.{n}") for n in (1, 2)]
    kitchen, attic = devices
    old = {"kitchen": "127.0.0.1:1", "attic": "127.0.0.1:2"}
    put(membership, **{name: Device(old[name], one.own.public) for name, one in zip(old, devices, strict=True)})
    announcers = [Announcer(name) for name in old]
    file = DeviceList(("attic", "worker 2", "laptop"), ("", old["kitchen"], "10.0.0.1:1"), None)
    try:
        for announcer, device in zip(announcers, devices, strict=True):
            announcer.say(device.endpoint, device.own.public, False)
        found = find_workers(folder, seconds=2.5, interfaces=LOOPBACK)
        assert found == ([attic.address, kitchen.address], ["attic", "kitchen"])
        put(membership, kitchen=Device(old["kitchen"], kitchen.own.public))
        by_file = find_workers(folder, file, seconds=2.5, interfaces=LOOPBACK)
        assert by_file == ([attic.address, kitchen.address, "10.0.0.1:1"], ["attic", "worker 2", "laptop"])
        named = find_workers(folder, workers=["attic", kitchen.address], seconds=0.1, interfaces=LOOPBACK)
        assert named == ([attic.address, kitchen.address], ["attic", "kitchen"])
        how = {"seconds": 2.5, "interfaces": LOOPBACK}
        for draft in ("kitchen", kitchen.address):  # it runs the draft, and no stage
            left = find_workers_and_draft(folder, None, None, draft, **how)  # type: ignore[arg-type]
            assert left == ([attic.address], ["attic"], kitchen.address)
        both = find_workers_and_draft(folder, None, ["attic"], "kitchen", 0.1, LOOPBACK)
        assert both == ([attic.address], ["attic"], kitchen.address)
        listed = find_workers_and_draft(folder, DeviceList(("attic",), ("",), None), None, "10.0.0.1:1", 0.1, LOOPBACK)
        assert listed == ([attic.address], ["attic"], "10.0.0.1:1")
        with pytest.raises(UsageError, match="shed was not found: is it on"):
            find_workers(folder, DeviceList(("shed",), ("",), None), seconds=0.1, interfaces=LOOPBACK)
    finally:
        for one in (*announcers, *devices):
            one.close()


@pytest.mark.usefixtures("multicast")
def test_commands_say_who_waits_and_let_them_in(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowspec.cluster.mdns.own_addresses", lambda: LOOPBACK)
    membership = Membership.init(folder)
    assert "there is no join token" in run("cluster", "add", "--discover").err
    waiting = Waiting(tmp_path / "device", str(membership.new_token()), "attic")
    announcer = Announcer("attic")
    try:
        announcer.say(waiting.endpoint, str(waiting.member.waits_with), True)
        address = waiting.endpoint.removeprefix("tcp://")
        listed = run("cluster", "status", "--discover").out
        assert listed == f"no device has joined; flowspec cluster token says how\nattic  {address}  waits to join\n"
        added = run("cluster", "add", "--discover")
        assert (added.code, added.out) == (0, f"attic ({address}) has joined\n"), added.err
        waiting.end()
    finally:
        announcer.close()


def test_addresses_may_be_left_out_where_devices_are_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "home.toml"
    path.write_text('[[device]]\nname = "attic"\nlayers = "0:4"\n\n[[device]]\nname = "shed"\nlayers = "4:6"\n')
    assert DeviceList.load(path, by_name=True).addresses == ("", "")
    with pytest.raises(UsageError, match=r"line 1: \[\[device\]\] address is missing"):
        DeviceList.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker", "--discover", "--insecure"], "--discover or --insecure, not both"),
        (["worker", "--discover", "--listen", "127.0.0.1:0"], "is of this machine alone, and nobody finds it"),
        (["worker", "--discover"], "this device has joined no cluster: give --join"),
        (["generate", "x", "--discover", "--insecure"], "--discover or --insecure, not both"),
        (["generate", "x", "--discover", "--stages", "2"], "--stages for processes here, or --discover"),
        (["generate", "x", "--discover"], "flowspec cluster init"),
        (["cluster", "add"], "the address where the device waits, or --discover"),
        (["cluster", "add", "a:1", "--discover"], "the address where the device waits, or --discover"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line(run: Run, folder: Path, arguments: list[str], message: str) -> None:
    if arguments[0] == "cluster":
        Membership.init(folder)
    done = run(*arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


# --- machines ---


@pytest.fixture
def network() -> Iterator[Network]:
    with network_of(3, 1000) as made:
        yield made


def test_devices_join_and_are_found_again_at_new_addresses(network: Network, tmp_path: Path) -> None:
    """On machines of their own, by commands alone: nobody writes an address."""

    def flowspec(*arguments: str) -> str:
        command = [*network.inside(0), sys.executable, "-m", "flowspec", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path, 0), timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def worker(place: int, *arguments: str) -> LoggedProcess:
        command = ["worker", "--threads", "1", "--discover", "--name", f"box-{place}", *arguments]
        return LoggedProcess(command, "listening on", network.inside(place), env=environment(tmp_path, place))

    model = shutil.copytree(demo_directory(), tmp_path / "model")
    generate = ("generate", "def main(", "--model", str(model), "--discover", "--max-new-tokens", "8")
    token = str(Membership.init(tmp_path / "state0").new_token())
    workers = [worker(place, "--join", token) for place in (1, 2)]
    try:
        assert all(one.comes_up(60) for one in workers), [one.log for one in workers]
        assert len(flowspec(*generate)) > 8
        joined = Membership.init(tmp_path / "state0").devices
        assert {name: device.address for name, device in joined.items()} == {
            "box-1": f"{network.address(1)}:7070", "box-2": f"{network.address(2)}:7070",
        }  # fmt: skip
        network.move(2, "10.71.0.77")  # as with a new lease; the worker goes on
        deadline_s = time.monotonic() + 30
        while "announced at 10.71.0.77" not in workers[1].log:
            assert time.monotonic() < deadline_s, workers[1].log
            time.sleep(0.1)
        told = flowspec("cluster", "status", "--discover")
        assert told.count("answers") == 2 and "10.71.0.77:7070" in told
    finally:
        for one in workers:
            one.process.terminate()
            one.wait(20)
    assert not network.pids(), "a process is left"
