"""Damaged frames against a real worker, and damaged replies against the driver. Prints one JSON object.

    python benchmarks/fuzz.py [--joined] [--frames 100000] [--seed 0] [--model DIRECTORY]

Three parts. ``strangers``, a process of their own: frames, raw bytes and quick disconnects come from nobody in
particular, while a session generates, whose text must stay what it was; every other text is left in peace, and their
speeds are compared. ``driver``: sessions of the worker's own driver break the protocol. ``replies``: what workers say
is damaged on its way to a driver in this process. ``--joined``: the worker has joined a cluster, strangers come
without keys and with wrong ones, and hear nothing; the driver has the right ones. Exits with 1 where the worker ended
or grew by more than 50 MB, a text changed, a stranger without the right keys heard an answer, or an error came that is
none of flowspec's own.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import socket
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
import zmq

from damage import Damage, frames_of, messages_to_worker
from elsewhere import WorkerElsewhere, joined_workers
from flowspec.cluster.connections import Connections, LoadProgress
from flowspec.cluster.membership import security_of
from flowspec.cluster.replies import Replies
from flowspec.cluster.trips import Trip
from flowspec.config import LinkConfig
from flowspec.core import SamplingParams
from flowspec.errors import FlowspecError, ProtocolError
from flowspec.llm import LLM
from flowspec.model.loader import Checkpoint
from flowspec.wire.actor import Send
from flowspec.wire.codec import Codec
from flowspec.wire.curve import KeyPair, Security, secure_connection
from flowspec.wire.key_file import state_folder
from flowspec.wire.messages import Alive, Failed, Failure, Loading, Message, Ready, Stop, ToDriver

PROMPT_IDS = (5, 9, 5, 9, 5, 7, 5, 9)
PARAMS = SamplingParams(48, ignore_eos=True)
LINK = LinkConfig(heartbeat_timeout_s=3.0)
PATIENCE_S = 0.15  # with a request that hears nothing more
MAX_GROWTH_BYTES = 50 * 10**6
SHARES = {"strangers": 0.5, "driver": 0.48, "replies": 0.02}  # of all frames; replies take longest
STORM = 20  # connections of a stranger that end at once
# --- the worker ---


@contextmanager
def running_worker(is_joined: bool) -> Iterator[tuple[WorkerElsewhere, Security | None]]:
    """The worker, and how its driver connects to it."""
    quiet = {"HF_HUB_OFFLINE": "1"}  # a damaged name is no reason to ask the hub
    if is_joined:
        with joined_workers(1, quiet) as (worker,):
            yield worker, security_of([worker.address], state_folder(), insecure=False)
    else:
        with WorkerElsewhere(environment=quiet) as worker:
            yield worker, None


def connect(peer: zmq.Socket[bytes], address: str, security: Security | None) -> None:
    """As the worker's driver does."""
    if security is not None:
        secure_connection(peer, security.own, security.keys[address])
    peer.connect(f"tcp://{address}")


class Strangers:
    """Send so many frames a second, while they may."""

    def __init__(self, model: str, address: str, server_key: str | None, rate: float, random: Random) -> None:
        """``server_key``: the worker's public one, which is no secret."""
        checkpoint = Checkpoint.open(model)
        messages = messages_to_worker(checkpoint.full_name, checkpoint.num_layers, LINK.heartbeat_s)
        self._messages = [frames_of(message) for message in messages]
        self._address, self._server_key, self._rate, self._random = address, server_key, rate, random
        context = multiprocessing.get_context("spawn")
        self._may_send, self._is_over = context.Event(), context.Event()
        self._counts: Any = context.Queue()
        self._process = context.Process(target=self._run, daemon=True)
        self.num_frames = context.Value("i", 0)

    def start(self) -> None:
        self._process.start()

    def may_send(self, may: bool) -> None:
        if may:
            self._may_send.set()
        else:
            self._may_send.clear()

    def end(self) -> Counter[str]:
        """What they have done."""
        self._is_over.set()
        self._may_send.set()
        counts = self._counts.get(timeout=60)
        self._process.join(60)
        return counts

    def _run(self) -> None:
        self._made: Counter[str] = Counter()
        context: zmq.Context[Any] = zmq.Context()
        next_s = time.monotonic()
        while not self._is_over.is_set():
            self._may_send.wait()
            next_s = max(next_s, time.monotonic() - 1.0) + self._visit(context) / self._rate
            self._send_raw()
            if self._random.random() < 0.5:
                self._storm()
            self.num_frames.value = self._made["frames"]
            time.sleep(max(0.0, next_s - time.monotonic()))
        context.destroy(linger=0)
        self._counts.put(self._made)

    def _visit(self, context: zmq.Context[Any]) -> int:
        """One connection; how many frames it was."""
        peer, random, damage = context.socket(zmq.DEALER), self._random, Damage(self._random)
        peer.linger = random.choice((0, 50))
        peer.sndhwm = 0
        kind = random.choice((b"data", b"control"))
        peer.setsockopt(zmq.IDENTITY, b"fuzz%d:%s" % (random.randrange(5), kind))
        peer.setsockopt(zmq.HEARTBEAT_IVL, random.choice((0, 100)))
        if self._server_key is not None and random.random() < 0.7:
            secure_connection(peer, KeyPair.new(), random.choice((self._server_key, KeyPair.new().public)))
        peer.connect(f"tcp://{self._address}")
        num_frames = random.randrange(100)
        for _ in range(num_frames):
            frames = random.choice(self._messages)
            peer.send_multipart(damage.apply(frames) if random.random() < 0.7 else frames)
        self._made["frames"] += num_frames
        self._made["answers"] += bool(peer.poll(5))
        peer.close()
        return num_frames

    def _storm(self) -> None:
        """Connections that come and go at once."""
        for _ in range(STORM):
            self._send_raw()
        self._made["storms"] += 1

    def _send_raw(self) -> None:
        host, port = self._address.split(":")
        with socket.create_connection((host, int(port))) as raw:
            if self._random.random() < 0.5:  # a reset instead of a goodbye
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.sendall(self._random.choice((b"", b"\xff\0\0\0\0\0\0\0\x01\x7f\3\0NULL")) + self._random.randbytes(20))
        self._made["raw connections"] += 1


def fuzz_as_strangers(
    model: str, address: str, num_frames: int, strangers: Strangers, random: Random
) -> dict[str, Any]:
    """Raises ``SystemExit`` for a text that changes."""
    speeds: dict[bool, list[float]] = {False: [], True: []}  # with strangers or without, in turn
    with LLM(model, workers=[address], draft="ngram", link=LINK) as llm:
        expected = llm.generate(PROMPT_IDS, PARAMS).token_ids
        try:
            while strangers.num_frames.value < num_frames:
                for come in random.sample((False, True), 2):
                    strangers.may_send(come)
                    done = llm.generate(PROMPT_IDS, PARAMS)
                    speeds[come].append(done.tokens_per_s)
                    if done.token_ids != expected:
                        raise SystemExit("the text has changed")
        finally:
            counts = strangers.end()
    ratios = [with_them / alone for alone, with_them in zip(speeds[False], speeds[True], strict=True)]
    return {**counts, "texts": len(ratios), "speed_with_them": statistics.median(ratios)}


def fuzz_as_driver(
    model: str, address: str, security: Security | None, num_frames: int, random: Random
) -> Counter[str]:
    """Sessions one after the other, each until the worker has enough of it."""
    checkpoint = Checkpoint.open(model)
    all_messages = messages_to_worker(checkpoint.full_name, checkpoint.num_layers, LINK.heartbeat_s)
    *messages, configure, _ = all_messages
    counts: Counter[str] = Counter()
    context: zmq.Context[Any] = zmq.Context()
    while counts["messages"] < num_frames:
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.IDENTITY, b"bad%d:control" % counts["sessions tried"])
        connect(peer, address, security)
        is_odd = random.random() < 0.3
        peer.send_multipart(Damage(random).apply(frames_of(configure)) if is_odd else frames_of(configure))
        if isinstance(answer_of(peer, 1.0 if is_odd else 30.0), Ready):
            counts["sessions"] += 1
            counts.update(break_session(peer, messages, random))
        counts["sessions tried"] += 1
        peer.send_multipart(frames_of(Stop()))
        peer.close(linger=1000)
    context.destroy(linger=1000)
    return counts


def break_session(peer: zmq.Socket[bytes], messages: Sequence[Message], random: Random) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _ in range(300):
        frames = frames_of(random.choice(messages))
        peer.send_multipart(Damage(random, 0.01).apply(frames) if random.random() < 0.5 else frames)
        counts["messages"] += 1
        while (answer := answer_of(peer, 0.0)) is not None:
            counts[f"answers {type(answer).__name__}"] += 1
            if isinstance(answer, Failure):
                return counts
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


def fuzz_replies(model: str, num_frames: int, random: Random) -> Counter[str]:
    """Raises whatever escapes the engine; a request that hears nothing more is given up."""
    counts: Counter[str] = Counter()
    torch.set_num_threads(1)
    with LLM(model, stages=2, in_process=True, draft="ngram") as llm:
        engine, checkpoint = llm.engine, llm.checkpoint
        replies = Replies(2, checkpoint.hidden_size, checkpoint.vocab_size, torch.float32)
        connections = DamagingConnections(engine.pipeline.connections, replies, random)
        engine.pipeline.connections = connections
        while connections.counts["replies"] < num_frames:
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
    parser.add_argument("--joined", action="store_true", help="the worker has joined a cluster, and has keys")
    parser.add_argument("--frames", type=int, default=100_000, help="of all parts together")
    parser.add_argument("--rate", type=float, default=500.0, help="of strangers, in frames/s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo", help="a directory, or demo")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model, random = arguments.model, Random(arguments.seed)
    counts = {part: int(share * arguments.frames) for part, share in SHARES.items()}
    told: dict[str, Any] = {"seed": arguments.seed}
    with running_worker(arguments.joined) as (worker, security):
        address, process = worker.address, worker.process
        server_key = None if security is None else security.keys[address]
        strangers = Strangers(model, address, server_key, arguments.rate, Random(random.random()))
        strangers.start()  # and wait
        LLM(model, workers=[address], draft="none", link=LINK).close()  # all that is loaded once
        before = process.memory_info().rss
        told["strangers"] = fuzz_as_strangers(model, address, counts["strangers"], strangers, random)
        told["driver"] = fuzz_as_driver(model, address, security, counts["driver"], Random(random.random()))
        with LLM(model, workers=[address], draft="ngram", link=LINK) as llm:
            told["worker answers"] = llm.generate(PROMPT_IDS, PARAMS).num_tokens == PARAMS.max_tokens
        growth = process.memory_info().rss - before
    log = worker.lines
    told |= {"worker_growth_bytes": growth, "log_lines": len(log), "longest_log_line": max(map(len, log))}
    try:
        told["replies"] = fuzz_replies(model, counts["replies"], Random(random.random()))
    except FlowspecError as error:
        told["replies"] = f"{type(error).__name__}: {error}"
    print(json.dumps(told, indent=2))
    is_heard = arguments.joined and told["strangers"]["answers"] > 0
    if growth > MAX_GROWTH_BYTES or is_heard or any("Traceback" in line for line in log):
        sys.exit(1)


if __name__ == "__main__":
    main()
