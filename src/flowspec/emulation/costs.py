"""What devices, links, the driver and collectives of an emulated cluster cost.

It knows costs only. Nothing here computes a model, keeps a clock or draws a random number; draws come in as arguments.
Times are seconds in names that end in ``_s``, milliseconds in ``_ms``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, get_args

from flowspec.checked import check_not_negative, check_positive
from flowspec.core import interpolate
from flowspec.errors import FieldError

Broadcast = Literal["direct", "tree"]
CostTable = Annotated[tuple[tuple[int, float], ...], "a list of [rows, ms]"]  # rows ascending

PACKET_BYTES = 1500


@dataclass(frozen=True)
class EmulatedModel:
    """The sizes of the model whose cost is emulated."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    layer_params: float  # weights of one layer, without those of experts
    kv_size: int  # numbers of K plus V for one token in one layer
    bytes_per_weight: float = 2.0
    bytes_per_activation: float = 2.0  # on the wire and in the KV cache
    weight_time_factor: float = 1.0  # how much longer reading weights takes than their bytes say: dequantisation
    num_experts: int = 0  # of one layer, in a mixture
    experts_per_row: int = 0  # that a row runs through
    expert_params: float = 0.0  # weights of one of them

    def __post_init__(self) -> None:
        check_positive(self, "num_layers", "hidden_size", "vocab_size", "layer_params", "kv_size")
        check_positive(self, "bytes_per_weight", "bytes_per_activation", "weight_time_factor")
        check_not_negative(self, "num_experts", "experts_per_row", "expert_params")
        if self.experts_per_row > self.num_experts:
            raise FieldError("experts_per_row", f"is {self.experts_per_row}, of {self.num_experts} experts")
        if bool(self.experts_per_row) != bool(self.expert_params):
            raise FieldError("expert_params", "goes with num_experts and experts_per_row; give all three, or none")

    def read_params(self, num_rows: int) -> float:
        """Weights of one layer that a forward of so many rows reads; each row chooses its experts by itself."""
        if not self.num_experts:
            return self.layer_params
        missed = (1 - self.experts_per_row / self.num_experts) ** num_rows
        return self.layer_params + self.num_experts * (1 - missed) * self.expert_params

    @property
    def row_params(self) -> float:
        """Weights of one layer that one row is multiplied by."""
        return self.layer_params + self.experts_per_row * self.expert_params


@dataclass(frozen=True)
class Device:
    """What a forward costs on one worker: a smooth roofline, or a measured table in its place."""

    name: str
    memory_gb_s: float  # effective bandwidth, not the data sheet's
    compute_tflops: float  # effective
    overhead_ms: float = 0.0  # fixed, for each forward
    layer_overhead_ms: float = 0.0  # kernel launches of one layer
    forward_ms: CostTable = ()  # measured (rows, ms) of one layer; replaces roofline and overheads

    def __post_init__(self) -> None:
        check_positive(self, "memory_gb_s", "compute_tflops")
        check_not_negative(self, "overhead_ms", "layer_overhead_ms")
        rows = [num_rows for num_rows, _ in self.forward_ms]
        if rows and (rows[0] < 1 or any(left >= right for left, right in pairwise(rows))):
            raise FieldError("forward_ms", f"has the rows {rows}; they must start at 1 or more and ascend")
        if not all(math.isfinite(ms) and ms > 0 for _, ms in self.forward_ms):
            raise FieldError("forward_ms", "has a time that is not positive; every entry is [rows, ms]")

    @property
    def fixed_s(self) -> float:
        """The part of a forward that does not depend on layers or rows."""
        return 0.0 if self.forward_ms else self.overhead_ms / 1e3

    def forward_s(self, model: EmulatedModel, num_layers: float, num_rows: int, context_len: int) -> float:
        """Seconds that ``num_layers`` layers take for ``num_rows`` rows behind ``context_len`` cached tokens."""
        if num_rows == 0:
            return 0.0
        return num_layers * self.layer_s(model, num_rows, context_len) + self.fixed_s

    def hint_s(self, model: EmulatedModel) -> float:
        """Seconds that a hint head takes: it reads the target's lm_head in 16 bits; the rows cost nothing beside it."""
        return 2 * model.vocab_size * model.hidden_size / (self.memory_gb_s * 1e9) + self.layer_overhead_ms / 1e3

    def layer_s(self, model: EmulatedModel, num_rows: int, context_len: int, num_shares: int = 1) -> float:
        """Seconds of one layer, or of one of ``num_shares`` equal shares of its weights and heads.

        Launches do not get fewer with smaller shares. A measured table holds its launches already, so it shrinks whole.
        """
        memory_s = 1 / (self.memory_gb_s * 1e9)
        kv = context_len * model.kv_size * model.bytes_per_activation * memory_s
        if self.forward_ms:
            return (interpolate(self.forward_ms, num_rows) / 1e3 + kv) / num_shares
        weights = model.read_params(num_rows) * model.bytes_per_weight * model.weight_time_factor * memory_s
        flops = 2 * model.row_params * num_rows / (self.compute_tflops * 1e12)
        # The fourth-power mean rounds the knee between the two limits.
        return ((weights**4 + flops**4) ** 0.25 + kv) / num_shares + self.layer_overhead_ms / 1e3


@dataclass(frozen=True)
class LinkModel:
    """One direction of a connection. A message arrives after it was serialised, plus latency, plus its extra delay."""

    name: str
    latency_ms: float  # one way
    bandwidth_mbps: float
    jitter_ms: float = 0.0  # each message is late by up to this, uniformly
    loss: float = 0.0  # probability that a packet of 1500 bytes is lost
    retransmit_ms: float = 200.0  # how much later a message with a lost packet comes

    def __post_init__(self) -> None:
        check_positive(self, "bandwidth_mbps")
        check_not_negative(self, "latency_ms", "jitter_ms", "retransmit_ms")
        if not 0 <= self.loss < 1:
            raise FieldError("loss", f"is {self.loss:.12g}; it must lie in [0, 1)")

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds of serialisation, in which the link is busy; without latency."""
        return num_bytes * 8 / (self.bandwidth_mbps * 1e6)

    def extra_delay_s(self, num_bytes: float, draw: float, loss_draw: float) -> float:
        """Jitter and loss in seconds, from two uniform draws in [0, 1). 0 on a link with neither."""
        num_packets = max(1, math.ceil(num_bytes / PACKET_BYTES))
        is_late = loss_draw < 1 - (1 - self.loss) ** num_packets
        return (self.jitter_ms * draw + self.retransmit_ms * is_late) / 1e3


@dataclass(frozen=True)
class DriverCosts:
    """What the engine itself costs: the driver's work, how its commits reach the workers, and what a hop adds."""

    draft_pass_ms: float  # one forward of the draft head
    lm_head_ms: float  # for each verified result
    verify_ms: float  # walking the tree and sampling, for each verification
    merge_ms: float = 0.0  # after a commit that kept the tree
    send_ms: float = 0.0  # for each segment sent
    hint_ms: float = 0.0  # for each hint read
    int8_draft_pass_ms: float = 0.0  # a draft pass with head and lm_head in int8; 0: not given
    block_pass_ms: float | None = None  # one forward of a block draft, for all levels; ``None``: not given
    int8_block_pass_ms: float = 0.0  # the same in int8; 0: not given
    model_pass_ms: float | None = None  # one forward of a language model as draft; ``None``: not given
    int8_model_pass_ms: float = 0.0  # the same in int8; 0: not given
    grow_ms: float = 0.0  # giving nodes children from a block draft's guesses, for each such step
    hop_ms: float = 0.0  # codec, copies and sockets, for each hop of a segment
    broadcast: Broadcast = "direct"  # one message to every worker, or handed on along a binary tree
    broadcast_messages: int = 1  # messages, one after the other, that a commit consists of

    def __post_init__(self) -> None:
        check_not_negative(self, "draft_pass_ms", "lm_head_ms", "verify_ms", "merge_ms", "send_ms", "hop_ms")
        check_not_negative(self, "hint_ms", "int8_draft_pass_ms", "int8_block_pass_ms", "int8_model_pass_ms", "grow_ms")
        given = [name for name in ("block_pass_ms", "model_pass_ms") if getattr(self, name) is not None]
        check_not_negative(self, *given)
        check_positive(self, "broadcast_messages")
        if self.broadcast not in get_args(Broadcast):
            raise FieldError("broadcast", f"is {self.broadcast!r}; it must be 'direct' or 'tree'")

    def broadcast_hops(self, num_workers: int) -> int:
        """How many link latencies pass until a commit has arrived everywhere."""
        # ceil(log2(num_workers + 1)) in whole numbers
        hops = 1 if self.broadcast == "direct" else num_workers.bit_length()
        return self.broadcast_messages * hops


@dataclass(frozen=True)
class TensorParallel:
    """Costs of the tensor parallel baselines."""

    collective_overhead_ms: float = 0.0  # fixed, for each collective; staging through the CPU included

    def __post_init__(self) -> None:
        check_not_negative(self, "collective_overhead_ms")
