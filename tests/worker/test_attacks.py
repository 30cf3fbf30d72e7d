"""A real worker under attack: whatever strangers send, it goes on, and so does whoever is using it."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from msgspec.structs import replace

from flowspec import LLM, SamplingParams
from flowspec.config import LinkConfig
from flowspec.core import TapShape
from flowspec.errors import UsageError, WorkerError
from flowspec.wire.codec import Codec
from flowspec.wire.messages import (
    PROTOCOL_VERSION,
    Alive,
    Busy,
    Close,
    Configure,
    Echo,
    Failed,
    Failure,
    Loading,
    Message,
    Open,
    Probe,
    Ready,
    Segment,
    Stop,
    TapBlock,
)
from worker_process import WorkerProcess

LINK = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5)


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    """One for all tests of this file: each has to leave it as it was."""
    process = WorkerProcess()
    assert process.address
    yield process
    process.end()


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


class Peer:
    """One connection of a driver, honest or not."""

    def __init__(self, context: zmq.Context[Any], address: str, identity: bytes, heartbeat_ms: int = 0) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        if heartbeat_ms:
            self._socket.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms)
        self._socket.connect(f"tcp://{address}")

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._socket.send_multipart([bytes(frame) for frame in Codec().encode(message)])

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(list(frames))

    def answer(self, timeout_s: float = 30.0) -> Message | None:
        """The next message that tells more than that the worker lives; ``None``: none came in time."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self._socket.poll(int(1000 * left_s) + 1):
                frames = [bytearray(frame) for frame in self._socket.recv_multipart()]
                message = Codec().decode_to_driver(frames)
                if not isinstance(message, Alive | Loading):
                    return message
        return None

    def close(self, linger_s: float = 0.0) -> None:
        self._socket.close(linger=int(1000 * linger_s))


def configure(directory: Path, **fields: Any) -> Configure:
    return replace(Configure(PROTOCOL_VERSION, 1, str(directory), 0, 6, "float32", None, 0.5), **fields)


def begin(context: zmq.Context[Any], address: str, directory: Path, name: str) -> Peer:
    """A session; waits until the worker is free."""
    for _ in range(100):
        peer = Peer(context, address, f"{name}:control".encode())
        peer.send(configure(directory))
        answer = peer.answer()
        if isinstance(answer, Ready):
            return peer
        assert isinstance(answer, Busy), answer
        peer.close()
        time.sleep(0.1)
    raise AssertionError("the worker did not go back to waiting")


def end(peer: Peer) -> None:
    peer.send(Stop())
    peer.close(linger_s=1.0)


def test_two_connections_with_one_name_do_not_abort_the_worker(
    checkpoint_dir: Callable[[str], Path], worker: WorkerProcess, context: zmq.Context[Any]
) -> None:
    """The younger one took the name over, and libzmq ended the worker by an assertion when the older one closed."""
    for heartbeat_ms in (0, 500, 0, 500, 500, 500):
        older = Peer(context, worker.address, b"twin:control", heartbeat_ms)
        older.send_frames(b"1")
        time.sleep(0.05)
        younger = Peer(context, worker.address, b"twin:control", heartbeat_ms)
        younger.send_frames(b"2")
        time.sleep(0.05)
        older.send_frames(b"3")
        older.send_frames(b"4")
        older.close(linger_s=0.2)
        time.sleep(0.1)
        time.sleep(1.2 if heartbeat_ms == 0 else 0)
        younger.close()
    time.sleep(2.5)  # the worker's own heartbeat
    end(begin(context, worker.address, checkpoint_dir("llama"), "after"))


def test_quick_connects_and_disconnects_leave_the_worker_as_it_was(
    checkpoint_dir: Callable[[str], Path], worker: WorkerProcess, context: zmq.Context[Any]
) -> None:
    host, port = worker.address.split(":")
    for number in range(100):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"\xff\0\0\0\0\0\0\0\x01\x7f\3\0NULL"[: number % 16])
        peer = Peer(context, worker.address, f"storm{number % 7}:control".encode(), 100)
        peer.send_frames(b"x")
        peer.close()
    end(begin(context, worker.address, checkpoint_dir("llama"), "after"))


def test_a_session_cannot_be_taken_over_by_its_name(
    checkpoint_dir: Callable[[str], Path], worker: WorkerProcess, context: zmq.Context[Any]
) -> None:
    driver = begin(context, worker.address, checkpoint_dir("llama"), "mine")
    for identity in (b"mine:control", b"mine:other", b"mine"):
        thief = Peer(context, worker.address, identity)
        thief.send(Stop(), Probe(1, b""), configure(checkpoint_dir("llama")))
        assert not isinstance(thief.answer(0.5), Echo | Ready)
        thief.close()
    driver.send(Probe(7, b""))
    answer = driver.answer()
    assert isinstance(answer, Echo) and answer.number == 7
    end(driver)


def test_a_driver_that_vanished_is_followed_by_the_next_one(
    checkpoint_dir: Callable[[str], Path], worker: WorkerProcess, context: zmq.Context[Any]
) -> None:
    begin(context, worker.address, checkpoint_dir("llama"), "gone").close()
    end(begin(context, worker.address, checkpoint_dir("llama"), "next"))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"heartbeat_s": 0.0}, "heartbeat of 0.0"),
        ({"heartbeat_s": math.nan}, "heartbeat of nan"),
        ({"stage": -5}, "no stage -5"),
        ({"next_address": "tcp://eth0;1.2.3.4:5"}, "no address of a next worker"),
        ({"end_layer": 2**40}, "there is no layer range"),
    ],
)
def test_an_odd_beginning_is_refused_with_a_reason(
    checkpoint_dir: Callable[[str], Path],
    worker: WorkerProcess,
    context: zmq.Context[Any],
    fields: dict[str, Any],
    told: str,
) -> None:
    peer = Peer(context, worker.address, b"odd:control")
    peer.send(configure(checkpoint_dir("llama"), **fields))
    answer = peer.answer()
    assert isinstance(answer, Failure) and told in answer.text
    peer.close()


def test_one_worker_cannot_be_two_stages(checkpoint_dir: Callable[[str], Path], worker: WorkerProcess) -> None:
    with pytest.raises(UsageError, match="named twice"):
        LLM(checkpoint_dir("llama"), workers=[worker.address] * 2, link=LINK)
    spelled = worker.address.replace("127.0.0.1", "localhost")
    with pytest.raises(WorkerError, match=r"worker [12] .* is busy: it has stage [12] already; give each worker once"):
        LLM(checkpoint_dir("llama"), workers=[worker.address, spelled], link=LINK)


def test_sessions_follow_each_other_at_once(checkpoint_dir: Callable[[str], Path], worker: WorkerProcess) -> None:
    """A worker that had not read the end of the one before said that it was busy."""
    for _ in range(4):
        with LLM(checkpoint_dir("llama"), workers=[worker.address], draft="none", link=LINK) as llm:
            assert llm.generate([1, 2, 3], SamplingParams(2)).num_tokens == 2


def test_a_busy_worker_is_asked_again(
    checkpoint_dir: Callable[[str], Path], worker: WorkerProcess, context: zmq.Context[Any]
) -> None:
    first = begin(context, worker.address, checkpoint_dir("llama"), "first")
    timer = threading.Timer(1.0, first.send, [Stop()])
    timer.start()
    with LLM(checkpoint_dir("llama"), workers=[worker.address], draft="none", link=LINK) as llm:
        assert llm.generate([1, 2, 3], SamplingParams(2)).num_tokens == 2
    timer.join()
    first.close()


def test_a_session_keeps_its_share_in_a_flood(
    checkpoint_dir: Callable[[str], Path], worker: WorkerProcess, context: zmq.Context[Any]
) -> None:
    """Valid small frames of strangers were read until there were none, and were kept in any number."""
    directory, params = checkpoint_dir("llama"), SamplingParams(30)
    process = worker.process
    with LLM(directory, workers=[worker.address], draft="ngram", link=LINK) as llm:
        expected = llm.generate([1, 4, 2, 1, 4, 2], params).token_ids
        before, is_over = process.memory_info().rss, threading.Event()
        sent = [threading.Thread(target=flood, args=(context, worker.address, number, is_over)) for number in range(4)]
        for thread in sent:
            thread.start()
        time.sleep(0.2)
        texts = [llm.generate([1, 4, 2, 1, 4, 2], params).token_ids for _ in range(3)]
        is_over.set()
        for thread in sent:
            thread.join()
        assert texts == [expected] * 3
    assert process.memory_info().rss - before < 100 * 2**20
    lines = [line for line in worker.log.splitlines() if "dropped a message" in line]
    assert 0 < len(lines) <= 20 and max(map(len, lines)) < 600


def flood(context: zmq.Context[Any], address: str, number: int, is_over: threading.Event) -> None:
    """Frames that would be messages of a session: until nobody waits for it any more, and some thousands at most."""
    peer = Peer(context, address, f"flood{number}:data".encode())
    messages = [Open(number, 0, 0, [], slot_limit=99), Probe(0, bytes(50)), Stop(), Close(number, 0)]
    for _ in range(1500):
        peer.send(*messages)
        if is_over.is_set():
            break
    peer.close()


def test_a_huge_frame_of_a_stranger_is_dropped_unread(
    checkpoint_dir: Callable[[str], Path], worker: WorkerProcess, context: zmq.Context[Any]
) -> None:
    """A chain of 40,000 rows made masks of 8.8 GB."""
    before = worker.process.memory_info().rss
    ids = list(range(40_000))
    chain = Segment(0, 0, 0, ids, [i - 1 for i in ids], ids, 0, ids, None, [])
    stranger = Peer(context, worker.address, b"stranger:data")
    stranger.send(Open(0, 0, 0, []), chain)
    driver = begin(context, worker.address, checkpoint_dir("llama"), "owner")
    driver.send(Open(0, 0, 0, [], slot_limit=2**40))
    assert isinstance(answer := driver.answer(), Failed) and "no text needs more" in answer.text
    driver.send(Open(1, 0, 0, []), replace(chain, request_id=1))
    assert isinstance(answer := driver.answer(), Failed) and "40000 rows" in answer.text
    end(driver)
    stranger.close()
    assert worker.process.memory_info().rss - before < 200 * 2**20


def test_blocks_of_a_draft_are_waited_for_and_held_against_what_was_said(
    context: zmq.Context[Any], worker: WorkerProcess, checkpoint_dir: Callable[[str], Path]
) -> None:
    """A worker is ready when it has them; one that does not fit ends the session, and no other one."""
    directory, taps = checkpoint_dir("llama"), TapShape((2, 6), 24)
    for shape, expected in ((torch.ones(12, 32), Ready), (torch.ones(12, 33), Failure)):
        end(begin(context, worker.address, directory, "before"))
        peer = None
        for attempt in range(100):
            name = f"blocks{shape.shape[1]}x{attempt}"  # one that is going away keeps its own for a while
            peer = Peer(context, worker.address, f"{name}:control".encode())
            peer.send(configure(directory, taps=taps))
            if not isinstance(peer.answer(timeout_s=1.0), Busy):
                break
            peer.close()
        assert peer is not None
        parts = [TapBlock(layer, first_row, shape) for layer in taps.layers for first_row in (0, 12)]
        peer.send(*parts[:3])
        assert expected is Failure or peer.answer(timeout_s=0.5) is None, "a part is missing"
        peer.send(parts[3])
        assert isinstance(peer.answer(), expected)
        end(peer)
    end(begin(context, worker.address, directory, "after"))
