"""Devices join by a token; from then on they and their driver know each other by keys, and nobody else is heard."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from command_line import Run
from flowspec import LLM, SamplingParams
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
        socket.send_multipart([bytes(frame) for frame in Codec().encode(configure)])
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
    old = JoinToken(token.driver_key, token.secret, int(time.time()) - 1)
    with pytest.raises(UsageError, match="expired"):
        JoinToken.parse(str(old))


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
    made = run("cluster", "init", "--minutes", "5")
    assert made.code == 0 and "flowspec1-" in made.out and "Valid for 5 minutes" in made.out
    assert "no device has joined" in run("cluster", "status").out
    membership = Membership.init(folder)
    membership.devices["shed"] = Device("127.0.0.1:9", KeyPair.new().public)
    membership.new_token()
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
