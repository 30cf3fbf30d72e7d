"""An emulated cluster: model, devices, links, partition, the driver's costs; and what a forward or a message costs.

It knows costs only. Nothing here computes a model, keeps a clock or draws a random number; draws come in as arguments.
Shipped files are in ``clusters/``. Times are seconds in names that end in ``_s``, milliseconds in ``_ms``.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast, get_args

from flowspec.core import Partition
from flowspec.errors import UsageError

if sys.version_info >= (3, 11):
    from tomllib import loads
else:
    from tomli import loads  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_parse_toml = cast("Callable[[str], dict[str, object]]", loads)
_Fields = TypeVar("_Fields", bound="DataclassInstance")
_Named = TypeVar("_Named")

Broadcast = Literal["direct", "tree"]
TensorParallelKind = Literal["tp-megatron", "tp-galaxy"]
CostTable = tuple[tuple[int, float], ...]  # (rows, ms), rows ascending

PACKET_BYTES = 1500


class _FieldError(UsageError):
    """A field out of its range. The message starts with the field; whoever read a file adds where it stands."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise _FieldError(name, f"is {value:.12g}; it must be positive")


def _check_not_negative(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value >= 0):
            raise _FieldError(name, f"is {value:.12g}; it must be 0 or positive")


@dataclass(frozen=True)
class EmulatedModel:
    """The sizes of the model whose cost is emulated."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    layer_params: float  # weights of one layer
    kv_size: int  # numbers of K plus V for one token in one layer
    bytes_per_weight: float = 2.0
    bytes_per_activation: float = 2.0  # on the wire and in the KV cache
    weight_time_factor: float = 1.0  # how much longer reading weights takes than their bytes say: dequantisation

    def __post_init__(self) -> None:
        _check_positive(self, "num_layers", "hidden_size", "vocab_size", "layer_params", "kv_size")
        _check_positive(self, "bytes_per_weight", "bytes_per_activation", "weight_time_factor")


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
        _check_positive(self, "memory_gb_s", "compute_tflops")
        _check_not_negative(self, "overhead_ms", "layer_overhead_ms")
        rows = [num_rows for num_rows, _ in self.forward_ms]
        if rows and (rows[0] < 1 or any(left >= right for left, right in pairwise(rows))):
            raise _FieldError("forward_ms", f"has the rows {rows}; they must start at 1 or more and ascend")
        if not all(math.isfinite(ms) and ms > 0 for _, ms in self.forward_ms):
            raise _FieldError("forward_ms", "has a time that is not positive; every entry is [rows, ms]")

    @property
    def fixed_s(self) -> float:
        """The part of a forward that does not depend on layers or rows."""
        return 0.0 if self.forward_ms else self.overhead_ms / 1e3

    def forward_s(self, model: EmulatedModel, num_layers: int, num_rows: int, context_len: int) -> float:
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
            return (_interpolate(self.forward_ms, num_rows) / 1e3 + kv) / num_shares
        weights = model.layer_params * model.bytes_per_weight * model.weight_time_factor * memory_s
        flops = 2 * model.layer_params * num_rows / (self.compute_tflops * 1e12)
        # The fourth-power mean rounds the knee between the two limits.
        return ((weights**4 + flops**4) ** 0.25 + kv) / num_shares + self.layer_overhead_ms / 1e3


def _interpolate(table: CostTable, num_rows: int) -> float:
    """Linear between entries, constant below the first, on with the last slope (but never falling) beyond the last."""
    rows = [entry[0] for entry in table]
    if num_rows <= rows[0] or len(rows) == 1:
        return table[0][1]
    right = min(bisect_left(rows, num_rows), len(rows) - 1)
    (left_rows, left_ms), (right_rows, right_ms) = table[right - 1], table[right]
    slope = (right_ms - left_ms) / (right_rows - left_rows)
    if num_rows > right_rows:
        return right_ms + max(slope, 0.0) * (num_rows - right_rows)
    return left_ms + slope * (num_rows - left_rows)


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
        _check_positive(self, "bandwidth_mbps")
        _check_not_negative(self, "latency_ms", "jitter_ms", "retransmit_ms")
        if not 0 <= self.loss < 1:
            raise _FieldError("loss", f"is {self.loss:.12g}; it must lie in [0, 1)")

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
    hop_ms: float = 0.0  # codec, copies and sockets, for each hop of a segment
    broadcast: Broadcast = "direct"  # one message to every worker, or handed on along a binary tree
    broadcast_messages: int = 1  # messages, one after the other, that a commit consists of

    def __post_init__(self) -> None:
        _check_not_negative(self, "draft_pass_ms", "lm_head_ms", "verify_ms", "merge_ms", "send_ms", "hop_ms")
        _check_not_negative(self, "hint_ms", "int8_draft_pass_ms")
        _check_positive(self, "broadcast_messages")
        if self.broadcast not in get_args(Broadcast):
            raise _FieldError("broadcast", f"is {self.broadcast!r}; it must be 'direct' or 'tree'")

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
        _check_not_negative(self, "collective_overhead_ms")


@dataclass(frozen=True)
class ClusterSpec:
    """A whole emulated cluster. The driver sends to worker 1, worker i to worker i + 1, the last one to the driver."""

    name: str
    model: EmulatedModel
    devices: tuple[Device, ...]  # of the workers, in pipeline order
    links: tuple[LinkModel, ...]  # driver to worker 1, between workers, last worker to driver
    control: LinkModel  # carries the commits
    partition: Partition
    published: DriverCosts  # for the schedules as they were published
    ours: DriverCosts  # for the schedules of this package
    tensor_parallel: TensorParallel

    def __post_init__(self) -> None:
        num_devices = len(self.devices)
        if not num_devices:
            raise _FieldError("devices", "is empty; name one device for each worker")
        if len(self.links) != num_devices + 1:
            raise _FieldError(
                "links",
                f"has {len(self.links)} names for {num_devices} devices; write one name for all links, or "
                f"{num_devices + 1}: driver to first worker, between workers, last worker to driver",
            )
        if len(self.partition) != num_devices:
            raise _FieldError(
                "partition",
                f"{self.partition} has {len(self.partition)} stages for {num_devices} devices; "
                "write one range for each device",
            )
        self.partition.check_fits(self.model.num_layers)

    @property
    def num_stages(self) -> int:
        return len(self.devices)

    @classmethod
    def load(cls, path: str | Path) -> ClusterSpec:
        """Read a cluster file (TOML); see ``clusters/`` for the form."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; give the path of a cluster file (TOML)") from None
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8 text; give the path of a cluster file (TOML)") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source_name: str) -> ClusterSpec:
        """Read the text of a cluster file; ``source_name`` stands in errors, and its stem is the default name."""
        root = _Table.parse(text, source_name)
        root.check_keys(["name", "model", "device", "link", "pipeline", "driver", "tensor_parallel"])
        model = root.table("model").read(EmulatedModel)
        devices = {name: table.read(Device, name=name) for name, table in root.table("device").tables()}
        links = {name: table.read(LinkModel, name=name) for name, table in root.table("link").tables()}
        driver = root.table("driver")
        driver.check_keys(["published", "ours"])
        published, ours = (driver.table(key).read(DriverCosts) for key in ("published", "ours"))
        tensor_parallel = TensorParallel()
        if "tensor_parallel" in root.values:
            tensor_parallel = root.table("tensor_parallel").read(TensorParallel)

        table = root.table("pipeline")
        pipeline = table.read(_Pipeline)
        link_names = pipeline.link_names
        stage_devices = tuple(table.look_up("devices", name, "device", devices) for name in pipeline.devices)
        stage_links = tuple(table.look_up("links", name, "link", links) for name in link_names)
        control = table.look_up("control", pipeline.control or link_names[0], "link", links)
        name = root.text_of("name", default=Path(source_name).stem)
        try:
            if pipeline.partition is None:
                partition = Partition.even(model.num_layers, len(stage_devices))
            else:
                partition = Partition.parse(pipeline.partition)
            return cls(name, model, stage_devices, stage_links, control, partition, published, ours, tensor_parallel)
        except _FieldError as error:
            raise table.error(error.field, str(error)) from None
        except UsageError as error:
            key = "devices" if pipeline.partition is None else "partition"
            raise table.error(key, f"{key}: {error}") from None

    def stage_s(self, stage_index: int, num_rows: int, context_len: int) -> float:
        """Seconds of one forward of a stage, counted from 0."""
        num_layers = len(self.partition.stages[stage_index])
        return self.devices[stage_index].forward_s(self.model, num_layers, num_rows, context_len)

    def with_bandwidth(self, mbps: float) -> ClusterSpec:
        """The same cluster with this bandwidth on every link."""
        links = tuple(replace(link, bandwidth_mbps=mbps) for link in self.links)
        return replace(self, links=links, control=replace(self.control, bandwidth_mbps=mbps))

    def with_latency(self, latency_ms: float) -> ClusterSpec:
        """The same cluster with this latency on every link."""
        links = tuple(replace(link, latency_ms=latency_ms) for link in self.links)
        return replace(self, links=links, control=replace(self.control, latency_ms=latency_ms))

    def with_stages(self, num_stages: int) -> ClusterSpec:
        """An even partition over the devices, repeated in order; unless their number stays, all links are the first."""
        partition = Partition.even(self.model.num_layers, num_stages)
        devices = tuple(self.devices[i % len(self.devices)] for i in range(num_stages))
        links = self.links if num_stages == self.num_stages else (self.links[0],) * (num_stages + 1)
        return replace(self, devices=devices, links=links, partition=partition)

    def tensor_parallel_s(self, kind: TensorParallelKind, num_rows: int, context_len: int) -> float:
        """Seconds of one forward of the whole model with every layer cut over all N devices.

        ``tp-megatron`` (Megatron-LM, arXiv 1909.08053): two all-reduces of all hidden states for each layer. A ring
        all-reduce takes 2 (N - 1) steps and moves 2 (N - 1) / N of the bytes over every link; the slowest one decides.
        ``tp-galaxy`` (Galaxy, arXiv 2405.17245, tensor and sequence parallel): each all-reduce is split into
        reduce-scatter and all-gather, whose ring steps overlap with the matrix products. The overlap is perfect here,
        so this is a lower bound of Galaxy's time.
        """
        if num_rows == 0:
            return 0.0
        num_layers, num_shares = self.model.num_layers, self.num_stages
        compute = max(device.layer_s(self.model, num_rows, context_len, num_shares) for device in self.devices)
        fixed = max(device.fixed_s for device in self.devices)
        if num_shares == 1:
            return num_layers * compute + fixed

        num_bytes = num_rows * self.model.hidden_size * self.model.bytes_per_activation
        sent_bytes = 2 * (num_shares - 1) / num_shares * num_bytes
        wire = 2 * max(link.transfer_s(sent_bytes) for link in self.links)
        latency_ms = 2 * (num_shares - 1) * max(link.latency_ms for link in self.links)
        waiting = 2 * (latency_ms + self.tensor_parallel.collective_overhead_ms) / 1e3
        match kind:
            case "tp-megatron":
                layer = compute + wire + waiting
            case "tp-galaxy":
                layer = max(compute, wire) + waiting
        return num_layers * layer + fixed


# Reading a file: every mistake is reported with its file, line, table and key.


@dataclass(frozen=True)
class _Pipeline:
    """The table ``[pipeline]`` as written."""

    devices: tuple[str, ...]
    links: str | tuple[str, ...]
    control: str | None = None
    partition: str | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "links"):
            if not getattr(self, name):
                raise _FieldError(name, "is empty; name at least one")

    @property
    def link_names(self) -> tuple[str, ...]:
        return (self.links,) * (len(self.devices) + 1) if isinstance(self.links, str) else self.links


@dataclass(frozen=True)
class _Table:
    """One table of a file, with what is needed to say where something stands."""

    source_name: str
    text: str  # of the whole file
    path: tuple[str, ...]  # () is the root
    values: Mapping[str, object]

    @classmethod
    def parse(cls, text: str, source_name: str) -> _Table:
        text = text.replace("\r\n", "\n")
        try:
            return cls(source_name, text, (), _parse_toml(text))
        except (ValueError, RecursionError) as error:
            found = re.search(r" \(at line (\d+), column \d+\)", str(error))
            line = int(found[1]) if found else text.count("\n") + 1
            problem = str(error).replace(found[0], "") if found else str(error)
            raise UsageError(f"{source_name}, line {line}: this is not TOML: {problem}") from None

    def error(self, key: str, message: str) -> UsageError:
        """``message``, which names ``key``, after the line of the key, or of the table that should have it."""
        lines = (_line_of(self.text, path) for path in ((*self.path, key), self.path) if path)
        line = next((f", line {line}" for line in lines if line), "")
        table = f"[{'.'.join(self.path)}] " if self.path else ""
        return UsageError(f"{self.source_name}{line}: {table}{message}")

    def table(self, key: str) -> _Table:
        path = (*self.path, key)
        if key not in self.values:
            raise self.error(key, f"{key} is missing; add the table [{'.'.join(path)}]")
        values = self.values[key]
        if not isinstance(values, dict):
            raise self.error(key, f"{key} is {_show(values)}; it must be a table, [{'.'.join(path)}]")
        return _Table(self.source_name, self.text, path, cast("dict[str, object]", values))

    def tables(self) -> list[tuple[str, _Table]]:
        """All inner tables by name, for tables whose keys are names."""
        return [(key, self.table(key)) for key in self.values]

    def check_keys(self, known: list[str]) -> None:
        for key in self.values:
            if key not in known:
                raise self.error(key, f"{key} is unknown; {_suggest(key, known)}")

    def text_of(self, key: str, default: str) -> str:
        """A text outside any dataclass."""
        value = self.values.get(key, default)
        try:
            return cast("str", _convert(key, "str", value))
        except _FieldError as error:
            raise self.error(key, str(error)) from None

    def read(self, kind: type[_Fields], **given: object) -> _Fields:
        """The table as a dataclass; its fields are the known keys, but for those that are given."""
        keys = [field for field in fields(kind) if field.name not in given]
        self.check_keys([field.name for field in keys])
        for field in keys:
            if field.default is MISSING and field.name not in self.values:
                raise self.error(field.name, f"{field.name} is missing; add it")
        try:
            values = {
                field.name: _convert(field.name, str(field.type), self.values[field.name])
                for field in keys
                if field.name in self.values
            }
            return cast("Callable[..., _Fields]", kind)(**given, **values)
        except _FieldError as error:
            raise self.error(error.field, str(error)) from None

    def look_up(self, key: str, name: str, kind: str, known: Mapping[str, _Named]) -> _Named:
        if name not in known:
            raise self.error(key, f"{key} names {name!r}, but there is no [{kind}.{name}]; {_suggest(name, known)}")
        return known[name]


def _line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line, from 1, that brings in the table or key ``path``. The parser decides: only whole statements parse."""
    lines = text.split("\n")
    start = 1
    for end in range(1, len(lines) + 1):
        try:
            value: object = _parse_toml("\n".join(lines[:end]))
        except ValueError:
            continue  # within a statement of several lines
        for key in path:
            value = cast("Mapping[str, object]", value).get(key) if isinstance(value, dict) else None
        if value is not None:
            return start
        start = end + 1
    return None


def _suggest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {close[0]}?" if close else "correct it or remove it;"
    return f"{advice} Known: {', '.join(names) or 'none'}"


def _show(value: object) -> str:
    """A value in about the form that TOML gives it, cut to a line's length."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _convert(key: str, kind: str, value: object) -> object:
    """A TOML value as the type that a field is annotated with."""
    match kind:
        case "str" | "str | None" | "Broadcast":
            expected = "a text in quotes"
            if isinstance(value, str):
                return value
        case "int":
            expected = "a whole number"
            if _is_number(value) and isinstance(value, int):
                return value
        case "float":
            expected = "a finite number"
            if _is_number(value):
                return float(cast("float", value))
        case "CostTable":
            expected = "a list of [rows, ms]"
            entries = [_items(entry) for entry in _items(value) or [None]]
            if all(e and len(e) == 2 and isinstance(e[0], int) and all(map(_is_number, e)) for e in entries):
                return tuple((e[0], float(cast("float", e[1]))) for e in entries if e)
        case "tuple[str, ...]" | "str | tuple[str, ...]":
            expected = "a list of names" if kind.startswith("tuple") else "a name or a list of names"
            if isinstance(value, str) and kind.startswith("str"):
                return value
            names = _items(value)
            if names is not None and all(isinstance(name, str) for name in names):
                return tuple(names)
        case _:
            raise AssertionError(f"no reader for {key}: {kind}")
    raise _FieldError(key, f"is {_show(value)}; it must be {expected}")


def _items(value: object) -> list[object] | None:
    return cast("list[object]", value) if isinstance(value, list) else None


def _is_number(value: object) -> bool:
    """A number that a float holds; true and false, NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
