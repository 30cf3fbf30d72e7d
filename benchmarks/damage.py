"""Messages that are spoiled, and what there is to spoil: for fuzzing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
import torch

from flowspec.core import FINAL
from flowspec.wire.codec import Codec
from flowspec.wire.messages import (
    PROTOCOL_VERSION,
    Close,
    Commit,
    Configure,
    End,
    Forget,
    Message,
    Open,
    Probe,
    Reserve,
    Segment,
    Step,
    Stop,
)

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


def messages_to_worker(model: str, num_layers: int, heartbeat_s: float) -> list[Message]:
    configure = Configure(PROTOCOL_VERSION, 1, model, 0, num_layers, "float32", None, heartbeat_s)
    prompt, ids = Segment(0, 0, 0, [0, 1, 2], [-1, 0, 1], [0, 1, 2], 2, [5, 6, 7], None, []), list(range(3, 40))
    tree = Segment(0, 0, 1, ids, [i - 1 for i in ids], ids, 0, [9] * len(ids), None, [])
    hidden = Segment(0, 0, 2, [50], [2], [3], 0, None, torch.zeros(1, 32), [])
    return [
        Open(0, 0, 2, [FINAL], slot_limit=500), prompt, tree, hidden, Commit(0, 0, [2, 3], 4), Step(0, 0, 3),
        Reserve(0, 0, 600), End(0, 0), Close(0, 0, [2, 3]), Open(1, 0, 2, [], cached_by=0, num_cached=2), Forget(0),
        Probe(1, b"x"), configure, Stop(),
    ]  # fmt: skip
