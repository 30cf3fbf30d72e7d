"""Damaged frames against a real worker, and damaged replies against the driver. Prints one JSON object.

    python benchmarks/fuzz.py [--seconds 60] [--seed 0] [--model DIRECTORY]

Three parts take a third of the time each. ``strangers``: frames, raw bytes and quick disconnects come from nobody in
particular while a session generates, whose text must stay what it was. ``driver``: sessions of the worker's own driver
break the protocol. ``replies``: what workers say is damaged on its way to a driver in this process. Exits with 1 where
the worker ended or grew by more than 100 MB, a text changed, or an error came that is none of flowspec's own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
import psutil
import torch
import zmq

from flowspec.cluster.connections import Connections, LoadProgress, Trip
from flowspec.cluster.replies import Replies
from flowspec.config import LinkConfig
from flowspec.core import FINAL, SamplingParams
from flowspec.errors import FlowspecError, ProtocolError
from flowspec.llm import LLM
from flowspec.model.loader import Checkpoint
from flowspec.wire.actor import Send
from flowspec.wire.codec import Codec
from flowspec.wire.messages import (
    PROTOCOL_VERSION,
    Alive,
    Close,
    Commit,
    Configure,
    End,
    Failed,
    Failure,
    Forget,
    Loading,
    Message,
    Open,
    Probe,
    Ready,
    Reserve,
    Segment,
    Step,
    Stop,
    ToDriver,
)

PROMPT_IDS = (5, 9, 5, 9, 5, 7, 5, 9)
PARAMS = SamplingParams(24, ignore_eos=True)
LINK = LinkConfig(heartbeat_timeout_s=3.0)
PATIENCE_S = 0.15  # with a request that hears nothing more
MAX_GROWTH_BYTES = 100 * 2**20
ODD: tuple[Any, ...] = (
    0, 1, -1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"),
    "", "x", "x" * 5000, "\x1b[2J\n", None, True, b"", b"\0" * 100, [], [0], list(range(3000)), {}, [[1], [2]],
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """One way to spoil a message after another, by a seed."""

    random: Random
    wild: float = 0.6  # how often bytes are spoiled; else one value becomes an odd one, and the rest stays a message

    def apply(self, frames: Sequence[bytes]) -> list[bytes]:
        spoiled = list(frames)
        match self.random.randrange(4) if self.random.random() < self.wild else None:
            case 0:
                return [self.random.randbytes(self.random.randrange(200)) for _ in range(self.random.randrange(1, 4))]
            case 1:
                spoiled.append(self.random.randbytes(9))
            case 2:
                spoiled[-1] = spoiled[-1][: self.random.randrange(len(spoiled[-1]) + 1)]
            case 3 if spoiled[0]:
                header = bytearray(spoiled[0])
                header[self.random.randrange(len(header))] ^= 1 << self.random.randrange(8)
                spoiled[0] = bytes(header)
            case _:
                spoiled[0] = self._with_odd_value(spoiled[0])
        return spoiled

    def _with_odd_value(self, header: bytes) -> bytes:
        """The header is a list: one of its fields, or one item of a field that is a list, becomes something odd."""
        fields: list[Any] = msgspec.msgpack.decode(header)
        place = self.random.randrange(1, len(fields)) if len(fields) > 1 else 0
        inner = fields[place]
        if isinstance(inner, list) and inner and self.random.random() < 0.8:
            index = self.random.randrange(len(inner))
            inner[index] = self._odd(inner[index])
        else:
            fields[place] = self._odd(inner)
        return msgspec.msgpack.encode(fields)

    def _odd(self, value: Any) -> Any:
        """Of the same type more often than not: what a decoder takes gets further."""
        alike = [odd for odd in ODD if type(odd) is type(value)]
        if isinstance(value, int) and self.random.random() < 0.3:
            return value + self.random.choice((-1, 1))
        return self.random.choice(alike if alike and self.random.random() < 0.9 else ODD)


def frames_of(message: Message) -> list[bytes]:
    return [bytes(frame) for frame in Codec().encode(message)]


def messages_to_worker(model: str, num_layers: int) -> list[Message]:
    configure = Configure(PROTOCOL_VERSION, 1, model, 0, num_layers, "float32", None, LINK.heartbeat_s)
    prompt, ids = Segment(0, 0, 0, [0, 1, 2], [-1, 0, 1], [0, 1, 2], 2, [5, 6, 7], None, []), list(range(3, 40))
    tree = Segment(0, 0, 1, ids, [i - 1 for i in ids], ids, 0, [9] * len(ids), None, [])
    hidden = Segment(0, 0, 2, [50], [2], [3], 0, None, torch.zeros(1, 32), [])
    return [
        Open(0, 0, 2, [FINAL], slot_limit=500), prompt, tree, hidden, Commit(0, 0, [2, 3], 4), Step(0, 0, 3),
        Reserve(0, 0, 600), End(0, 0), Close(0, 0, [2, 3]), Open(1, 0, 2, [], cached_by=0, num_cached=2), Forget(0),
        Probe(1, b"x"), configure, Stop(),
    ]  # fmt: skip


# --- the worker ---


@contextmanager
def running_worker() -> Iterator[tuple[str, psutil.Process, list[str]]]:
    """Its address, its process and its log so far."""
    command = [sys.executable, "-m", "flowspec", "worker", "--threads", "1", "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # a damaged name is no reason to ask the hub
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines: list[str] = []
    found: re.Match[str] | None = None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"listening on tcp://(\S+:\d+)", line):
            break
    if found is None:
        raise SystemExit(f"the worker did not come up: {''.join(lines)}")
    reader = threading.Thread(target=lambda stream: lines.extend(stream), args=(process.stderr,), daemon=True)
    reader.start()
    try:
        yield found[1], psutil.Process(process.pid), lines
    finally:
        process.terminate()
        process.wait(20)
        reader.join(5)
        process.stderr.close()


class Strangers(threading.Thread):
    """Send until they are told to stop."""

    def __init__(self, address: str, messages: Sequence[Message], random: Random) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.is_over = threading.Event()
        self._address = address
        self._messages = [frames_of(message) for message in messages]
        self._random = random

    def run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        damage = Damage(self._random)
        while not self.is_over.is_set():
            peer = context.socket(zmq.DEALER)
            peer.linger = self._random.choice((0, 50))
            peer.setsockopt(
                zmq.IDENTITY, b"fuzz%d:%s" % (self._random.randrange(5), self._random.choice((b"data", b"control")))
            )
            peer.setsockopt(zmq.HEARTBEAT_IVL, self._random.choice((0, 100)))
            peer.connect(f"tcp://{self._address}")
            for _ in range(self._random.randrange(100)):
                frames = self._random.choice(self._messages)
                peer.send_multipart(damage.apply(frames) if self._random.random() < 0.7 else frames)
                self.counts["frames"] += 1
            peer.close()
            self._send_raw()
            self.is_over.wait(0.005)
        context.destroy(linger=0)

    def _send_raw(self) -> None:
        host, port = self._address.split(":")
        with socket.create_connection((host, int(port))) as raw:
            if self._random.random() < 0.5:  # a reset instead of a goodbye
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.sendall(self._random.choice((b"", b"\xff\0\0\0\0\0\0\0\x01\x7f\3\0NULL")) + self._random.randbytes(20))
        self.counts["raw connections"] += 1


def fuzz_as_strangers(model: str, address: str, seconds: float, random: Random) -> Counter[str]:
    """Raises ``SystemExit`` for a text that changes."""
    checkpoint = Checkpoint.open(model)
    strangers = Strangers(address, messages_to_worker(checkpoint.full_name, checkpoint.num_layers), random)
    with LLM(model, workers=[address], draft="ngram", link=LINK) as llm:
        expected = llm.generate(PROMPT_IDS, PARAMS).token_ids
        strangers.start()
        try:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                if llm.generate(PROMPT_IDS, PARAMS).token_ids != expected:
                    raise SystemExit("the text has changed")
                strangers.counts["texts"] += 1
        finally:
            strangers.is_over.set()
            strangers.join()
    return strangers.counts


def fuzz_as_driver(model: str, address: str, seconds: float, random: Random) -> Counter[str]:
    """Sessions one after the other, each until the worker has enough of it."""
    checkpoint = Checkpoint.open(model)
    *messages, configure, _ = messages_to_worker(checkpoint.full_name, checkpoint.num_layers)
    counts: Counter[str] = Counter()
    context: zmq.Context[Any] = zmq.Context()
    end_s = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end_s:
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.IDENTITY, b"bad%d:control" % (number := number + 1))
        peer.connect(f"tcp://{address}")
        is_odd = random.random() < 0.3
        peer.send_multipart(Damage(random).apply(frames_of(configure)) if is_odd else frames_of(configure))
        if isinstance(answer_of(peer, 2.0 if is_odd else 30.0), Ready):
            counts["sessions"] += 1
            counts.update(break_session(peer, messages, random, end_s))
        counts["sessions tried"] += 1
        peer.send_multipart(frames_of(Stop()))
        peer.close(linger=1000)
    context.destroy(linger=1000)
    return counts


def break_session(peer: zmq.Socket[bytes], messages: Sequence[Message], random: Random, end_s: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _ in range(300):
        frames = frames_of(random.choice(messages))
        peer.send_multipart(Damage(random, 0.01).apply(frames) if random.random() < 0.5 else frames)
        counts["messages"] += 1
        while (answer := answer_of(peer, 0.0)) is not None:
            counts[f"answers {type(answer).__name__}"] += 1
            if isinstance(answer, Failure):
                return counts
        if time.monotonic() > end_s:
            break
    return counts


def answer_of(peer: zmq.Socket[bytes], timeout_s: float) -> ToDriver | None:
    deadline = time.monotonic() + timeout_s
    while peer.poll(int(1000 * max(0.0, deadline - time.monotonic()))):
        message = Codec().decode_to_driver([bytearray(frame) for frame in peer.recv_multipart()])
        if not isinstance(message, Alive | Loading):
            return message
    return None


# --- the driver ---


class DamagingConnections:
    """Connections of which some replies are damaged, and held against ``Replies`` as those of processes are.

    What is refused there would end the session; here it is counted, and what was meant is passed on.
    """

    def __init__(self, inner: Connections, replies: Replies, random: Random) -> None:
        self.counts: Counter[str] = Counter()
        self._inner = inner
        self._replies = replies
        self._random = random
        self._damage = Damage(random, 0.2)

    @property
    def link_bytes(self) -> int:
        return self._inner.link_bytes

    @property
    def trips(self) -> Mapping[int, Trip]:
        return self._inner.trips

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        return self._inner.await_ready(progress)

    def send(self, sends: Iterable[Send]) -> None:
        self._inner.send(sends)

    def probe(self) -> None:
        self._inner.probe()

    def receive(self, timeout_s: float) -> list[ToDriver]:
        return [
            self._damaged(message) if self._random.random() < 0.2 else message
            for message in self._inner.receive(timeout_s)
        ]

    def _damaged(self, message: ToDriver) -> ToDriver:
        self.counts["replies"] += 1
        try:
            frames = [bytearray(frame) for frame in self._damage.apply(frames_of(message))]
            damaged = Codec().decode_to_driver(frames)
            self._replies.check(damaged, self._replies.num_stages)
        except ProtocolError:
            self.counts["refused at the edge"] += 1
            return message
        return message if isinstance(damaged, (Failed, Failure)) else damaged

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        """The caches are what the driver has been led to believe, so nobody asks whether they add up."""


def fuzz_replies(model: str, seconds: float, random: Random) -> Counter[str]:
    """Raises whatever escapes the engine; a request that hears nothing more is given up."""
    counts: Counter[str] = Counter()
    torch.set_num_threads(1)
    with LLM(model, stages=2, in_process=True, draft="ngram") as llm:
        end_s = time.monotonic() + seconds
        engine, checkpoint = llm.engine, llm.checkpoint
        replies = Replies(2, checkpoint.hidden_size, checkpoint.vocab_size, torch.float32)
        connections = DamagingConnections(engine.pipeline.connections, replies, random)
        engine.pipeline.connections = connections
        while time.monotonic() < end_s:
            job, patience_s = engine.submit(PROMPT_IDS, PARAMS), time.monotonic() + PATIENCE_S
            while not job.is_finished and time.monotonic() < patience_s:
                if engine.step(0.05):
                    patience_s = time.monotonic() + PATIENCE_S
            counts["requests"] += 1
            if not job.is_finished:
                engine.cancel(job)
                counts["requests that hear nothing more"] += 1
            elif job.error is not None:
                counts["requests with an error"] += 1
                if "met a bug" in str(job.error):
                    raise SystemExit(f"no error of flowspec's own: {job.error}")
    return counts + connections.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo", help="a directory, or demo")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    share_s, random = arguments.seconds / 3, Random(arguments.seed)
    with running_worker() as (address, process, log):
        LLM(arguments.model, workers=[address], draft="none", link=LINK).close()  # all that is loaded once
        before = process.memory_info().rss
        told: dict[str, Any] = {"seed": arguments.seed, "seconds": arguments.seconds}
        told["strangers"] = fuzz_as_strangers(arguments.model, address, share_s, Random(random.random()))
        told["driver"] = fuzz_as_driver(arguments.model, address, share_s, Random(random.random()))
        with LLM(arguments.model, workers=[address], draft="ngram", link=LINK) as llm:
            told["worker answers"] = llm.generate(PROMPT_IDS, PARAMS).num_tokens == PARAMS.max_tokens
        growth = process.memory_info().rss - before
        told |= {"worker_growth_bytes": growth, "log_lines": len(log), "longest_log_line": max(map(len, log))}
    try:
        told["replies"] = fuzz_replies(arguments.model, share_s, Random(random.random()))
    except FlowspecError as error:
        told["replies"] = f"{type(error).__name__}: {error}"
    print(json.dumps(told, indent=2))
    if growth > MAX_GROWTH_BYTES or any("Traceback" in line for line in log):
        sys.exit(1)


if __name__ == "__main__":
    main()
