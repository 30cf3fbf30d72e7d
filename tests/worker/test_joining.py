"""Devices join by a token; from then on they and their driver know each other by keys, and nobody else is heard."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from command_line import Run
from flowspec import LLM, SamplingParams
from flowspec.cli.worker import _joined
from flowspec.cluster.membership import Device, Membership, answers, security_of
from flowspec.config import LinkConfig
from flowspec.errors import ProtocolError, UsageError, WorkerError
from flowspec.wire.codec import Codec
from flowspec.wire.curve import JoinToken, KeyPair, secure_connection
from flowspec.wire.key_file import STATE_VARIABLE, read_keys, write_keys
from flowspec.wire.messages import PROTOCOL_VERSION, Configure
from flowspec.wire.transport import Sender, is_local
from flowspec.worker.door import Door, Keys
from flowspec.worker.member import Member
from logged_process import LoggedProcess
from pump import Pump
from worker_process import WorkerProcess

PROMPT_IDS = [1, 4, 2, 1, 4, 2, 3]
LINK = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the driver's keys."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "driver"))
    return tmp_path / "driver"


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def wanted_text(directory: Path, num_tokens: int) -> list[int]:
    pump = Pump(directory, 1, "none", "ar")
    generation = pump.submit(PROMPT_IDS, SamplingParams(max_tokens=num_tokens))
    pump.run()
    return generation.output_ids


def hears(context: zmq.Context[Any], address: str, directory: Path, own: KeyPair | None, server_key: str) -> bool:
    """Whether a worker answers a driver that asks for a session, with these keys or with none."""
    with context.socket(zmq.DEALER) as socket:
        socket.linger = 0  # else what nobody takes keeps its context for ever
        socket.setsockopt(zmq.IDENTITY, b"stranger:control")
        if own is not None:
            secure_connection(socket, own, server_key)
        socket.connect(f"tcp://{address}")
        configure = Configure(PROTOCOL_VERSION, 1, str(directory), 0, 6, "float32", None, 0.5)
        socket.sndtimeo = 1500  # a stranger who was turned away before has nobody to send to
        try:
            socket.send_multipart([bytes(frame) for frame in Codec().encode(configure)])
        except zmq.Again:
            return False
        return bool(socket.poll(1500))


def test_workers_that_have_joined_give_the_text_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path], folder: Path, tmp_path: Path, context: zmq.Context[Any]
) -> None:
    """Then strangers, a worker that comes back with its keys alone, and one that is removed."""
    directory = checkpoint_dir("llama")
    wanted = wanted_text(directory, 40)
    membership = Membership.init(folder)
    token = str(membership.new_token())
    states = [tmp_path / f"device{i}" for i in (2, 3, 4)]
    workers = [
        WorkerProcess(f"127.0.0.{i}", 0, "--join", token, "--name", "box", state=state)
        for i, state in zip((2, 3, 4), states, strict=True)
    ]
    addresses = [worker.address for worker in workers]
    try:
        with pytest.raises(WorkerError, match="are its keys those that have joined"):
            LLM(directory, workers=addresses[:1], link=LinkConfig(start_timeout_s=1, insecure=True))
        assert [membership.let_join(address) for address in addresses] == ["box", "box-2", "box-3"]
        with LLM(directory, workers=addresses, link=LINK) as llm:
            assert llm.generate(PROMPT_IDS, SamplingParams(max_tokens=40), schedule="flow").token_ids == wanted
            # One loses its power in the middle, and comes back without a token: its keys are on its disk.
            port = int(addresses[1].rpartition(":")[2])
            found: list[list[int]] = []
            running = threading.Thread(
                target=lambda: found.append(llm.generate(PROMPT_IDS, SamplingParams(max_tokens=40)).token_ids)
            )
            workers[1].kill()
            running.start()
            time.sleep(0.5)
            workers[1] = WorkerProcess("127.0.0.3", port, state=states[1])
            running.join(60)
            assert found == [wanted]
        key = membership.devices["box"].key
        for own in (None, KeyPair.new(), KeyPair.of(str(read_keys(states[1] / "worker.json")["secret"]))):  # type: ignore[index]
            assert not hears(context, addresses[0], directory, own, key)
        assert hears(context, addresses[0], directory, membership.own, key)
        assert not answers(membership, Device(addresses[0], membership.devices["box-2"].key), 0.5)
        assert answers(membership, membership.devices["box"])
        membership.remove("box-2")
        with pytest.raises(UsageError, match=r"nobody at .* waits to join"):
            security_of(addresses, folder, insecure=False)
        membership.rotate()
        assert not answers(membership, Device(addresses[0], key), 0.5)
    finally:
        logs = [worker.end() for worker in workers]
    assert "dropped" not in logs[0] and "joined" in logs[0] and "joined" not in logs[1]


def test_a_worker_before_is_let_in_for_the_session_alone_and_begins_none(context: zmq.Context[Any]) -> None:
    keys = Keys(KeyPair.new(), KeyPair.new().public)
    other = KeyPair.new().public
    door = Door(context, "127.0.0.1:0", 1.0, keys)
    gate: Any = door._gate
    configure = Configure(PROTOCOL_VERSION, 2, "m", 2, 4, "float32", "127.0.0.9:1", 0.5, previous_key=other)
    door.open_for(configure)
    assert gate.callback("flowspec", other.encode()) and gate.callback("flowspec", keys.driver.encode())
    door.check_driver(Sender(b"a:control", keys.driver))
    with pytest.raises(ProtocolError, match="begins no session"):
        door.check_driver(Sender(b"a:control", other))
    with pytest.raises(UsageError, match=r"127.0.0.9:1 has not joined"):
        door.keys_to_next(configure)
    door.shut()
    assert not gate.callback("flowspec", other.encode()) and gate.callback("flowspec", keys.driver.encode())
    door.close()
    door.close()


def test_a_token_says_what_it_was_made_of() -> None:
    token = JoinToken(KeyPair.new().public, KeyPair.new().secret, int(time.time()) + 60)
    assert JoinToken.parse(str(token)) == token
    for text in ("", "flowspec1-", "flowspec1-???", str(token)[:-2], "other" + str(token)):
        with pytest.raises(UsageError, match="not all of one"):
            JoinToken.parse(text)
    assert JoinToken.parse(str(JoinToken(token.driver_key, token.secret, 3))).has_expired and not token.has_expired


def test_a_token_that_has_expired_joins_nobody(tmp_path: Path) -> None:
    old = JoinToken(KeyPair.new().public, KeyPair.new().secret, int(time.time()) - 1)
    with pytest.raises(UsageError, match="expired"):
        Member.join(tmp_path, str(old))
    assert not list(tmp_path.iterdir())


def test_keys_are_for_their_owner_alone(folder: Path) -> None:
    membership = Membership.init(folder)
    path = folder / "driver.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    membership.new_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Membership.init(folder).own == membership.own
    path.chmod(0o644)
    with pytest.raises(UsageError, match=r"others can read the keys in .*; make them anew, or: chmod 600"):
        Membership.open(folder)
    path.chmod(0o600)
    for text in ("", "[]", "{}", '{"secret": "x", "token": null, "expires_s": 0, "devices": {}}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="damaged"):
            Membership.open(folder)
    write_keys(folder / "worker.json", {"secret": membership.own.secret, "driver": 3, "token": None})
    with pytest.raises(UsageError, match="damaged"):
        Member.open(folder)


def put_device(membership: Membership, name: str, address: str) -> None:
    with membership._changing():
        membership.devices[name] = Device(address, KeyPair.new().public)


class Waiting:
    """A device that waits to be let in, in a thread."""

    def __init__(self, folder: Path, token: str, name: str) -> None:
        self.member = Member.join(folder, token)
        self._listens = threading.Event()
        self._endpoint = ""
        self._failed: list[Exception] = []
        self._thread = threading.Thread(target=self._wait, args=[name])
        self._thread.start()
        assert self._listens.wait(20)

    def _wait(self, name: str) -> None:
        try:
            self.member.await_driver("127.0.0.1:0", name, self._note)
        except UsageError as error:
            self._failed.append(error)

    def _note(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._listens.set()

    @property
    def address(self) -> str:
        return self._endpoint.removeprefix("tcp://")

    def end(self) -> str | None:
        """Why it has not joined; ``None``: it has."""
        self._thread.join(20)
        return str(self._failed[0]) if self._failed else None


def test_a_token_lets_in_as_many_devices_as_it_was_made_for(folder: Path, tmp_path: Path) -> None:
    membership = Membership.init(folder)
    token = str(membership.new_token(lifetime_s=6, num_devices=2))
    first, second, third = (Waiting(tmp_path / name, token, name) for name in ("a", "b", "c"))
    with pytest.raises(UsageError, match="nobody at"):
        membership.let_join("127.0.0.1:9", timeout_s=0.2)  # counts for nothing
    other = Membership.open(folder)  # another process of the same driver
    assert other is not None and other.let_join(first.address) == "a"
    assert membership.let_join(second.address) == "b"
    assert membership.devices.keys() == {"a", "b"}, "what the other one has done is not forgotten"
    for one in (membership, other):
        with pytest.raises(UsageError, match=r"as many devices as it was made for; .* flowspec cluster token"):
            one.let_join(third.address)
    assert first.end() is None and second.end() is None and "expired" in str(third.end())
    assert Membership.init(folder).devices == membership.devices
    with pytest.raises(UsageError, match=r"as many devices|expired"):
        Membership.init(folder).let_join(third.address)
    assert membership.new_token() and membership.check_token()


def test_a_service_may_give_its_token_at_every_start(folder: Path, tmp_path: Path) -> None:
    membership = Membership.init(folder)
    token = membership.new_token(lifetime_s=30)
    waiting = Waiting(tmp_path / "device", str(token), "a")
    again = Member.join(tmp_path / "device", str(token))  # while it waits, as after a restart
    assert again.own == waiting.member.own
    membership.let_join(waiting.address)
    assert waiting.end() is None
    for text in (str(token), str(JoinToken(token.driver_key, token.secret, 3))):  # also when it is over
        joined = Member.join(tmp_path / "device", text)
        assert joined.own == waiting.member.own and joined.await_driver("anywhere:1", "a") == "anywhere:1"
    assert Member.join(tmp_path / "device", str(membership.new_token())).own != waiting.member.own


def test_where_a_worker_listens_unless_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others reach only one that knows them by keys."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    assert _joined(None, None, None, False, None) == ("127.0.0.1:7070", None)
    assert _joined(None, None, None, True, None) == ("127.0.0.1:7070", None)
    keys = {"secret": KeyPair.new().secret, "driver": KeyPair.new().public, "token": None}
    write_keys(tmp_path / "worker.json", keys)
    listen, found = _joined(None, None, None, False, None)
    assert listen == "0.0.0.0:7070" and found is not None and found.driver == keys["driver"]


def test_only_who_has_the_token_joins(folder: Path, tmp_path: Path, context: zmq.Context[Any]) -> None:
    membership = Membership.init(folder)
    with pytest.raises(UsageError, match="no join token"):
        membership.let_join("127.0.0.1:9")
    member = Member.join(tmp_path / "device", str(membership.new_token(lifetime_s=3)))
    membership.new_token()  # the one before is worth nothing any more
    failed: list[Exception] = []

    def wait() -> None:
        try:
            member.await_driver("127.0.0.1:0", "late")
        except UsageError as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(UsageError, match=r"nobody at .* waits to join with this cluster's token"):
        membership.let_join("127.0.0.1:9", timeout_s=0.3)
    waiting.join(20)
    assert "expired" in str(failed[0]) and not membership.devices
    with pytest.raises(UsageError, match="expired"):
        Member.open(tmp_path / "device")


def test_addresses_elsewhere_need_keys(folder: Path) -> None:
    assert [is_local(a) for a in ("127.0.0.3:1", "localhost:1", "[::1]:1", "ipc:///tmp/x")] == [True] * 4
    assert not any(is_local(a) for a in ("192.168.1.2:1", "0.0.0.0:1", "jetson:1", "[fe80::1]:1"))
    assert security_of(["127.0.0.2:7070", "localhost:1"], folder, insecure=False) is None
    assert security_of(["192.168.1.2:7070"], folder, insecure=True) is None
    with pytest.raises(UsageError, match="have to join first: flowspec cluster init"):
        security_of(["192.168.1.2:7070"], folder, insecure=False)


def test_the_commands_say_what_there_is(run: Run, folder: Path) -> None:
    assert "make one with flowspec cluster init" in run("cluster", "status").err
    made = run("cluster", "init", "--minutes", "5", "--devices", "1")
    assert made.code == 0 and "flowspec1-" in made.out and "Valid for 5 minutes, for 1 device(s)" in made.out
    assert run("cluster", "token", "--devices", "0").code == 2
    assert "no device has joined" in run("cluster", "status").out
    membership = Membership.init(folder)
    put_device(membership, "shed", "127.0.0.1:9")
    listed = run("cluster", "status").out
    assert "shed  127.0.0.1:9" in listed and "does not answer" in listed
    assert "no device is called 'attic'; there are: shed" in run("cluster", "remove", "attic").err
    assert run("cluster", "remove", "shed").out == "removed shed\n"
    assert run("cluster", "rotate-keys").code == 0
    assert Membership.init(folder).own != membership.own
    refused = run("worker", "--listen", "0.0.0.0:0")
    assert refused.code == 2 and "this device has joined no cluster: give --join" in refused.err
    assert "not all of one" in run("worker", "--join", "flowspec1-x").err
    assert "give --join or --insecure" in run("worker", "--join", "x", "--insecure").err
    assert "not all of one" in run("worker", "--join", "-", stdin="flowspec1-y\n").err
    nothing = run("worker", "--join", "-", stdin="")
    assert nothing.code == 2 and "no join token comes on standard input" in nothing.err


def test_a_token_need_not_stand_in_the_list_of_processes(folder: Path, tmp_path: Path) -> None:
    membership = Membership.init(folder)
    token = str(membership.new_token())
    log = LoggedProcess(
        ["worker", "--listen", "127.0.0.2:0", "--name", "a", "--threads", "1"],
        "for the driver to let",
        env={**os.environ, STATE_VARIABLE: str(tmp_path / "a"), "FLOWSPEC_JOIN": token},
    )
    assert log.comes_up(60) and token not in " ".join(psutil.Process(log.process.pid).cmdline())
    log.process.terminate()
    log.wait(20)
    piped = LoggedProcess(
        ["worker", "--listen", "127.0.0.2:0", "--name", "b", "--threads", "1", "--join", "-"],
        "for the driver to let",
        env={**os.environ, STATE_VARIABLE: str(tmp_path / "b")},
        stdin=subprocess.PIPE,
    )
    assert piped.process.stdin is not None
    piped.process.stdin.write(f"{token}\n")
    piped.process.stdin.close()
    assert piped.comes_up(60), piped.log
    piped.process.terminate()
    piped.wait(20)
