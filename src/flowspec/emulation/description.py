"""An emulated cluster: model, devices, links, partition, the driver's costs; and the file that describes it.

Shipped files are in ``clusters/``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from flowspec.core import Partition
from flowspec.emulation.costs import Device, DriverCosts, EmulatedModel, LinkModel, TensorParallel
from flowspec.errors import FieldError, UsageError
from flowspec.toml_table import Table

TensorParallelKind = Literal["tp-megatron", "tp-galaxy"]

_Names = Annotated[tuple[str, ...], "a list of names"]


@dataclass(frozen=True)
class ClusterDescription:
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
            raise FieldError("devices", "is empty; name one device for each worker")
        if len(self.links) != num_devices + 1:
            raise FieldError(
                "links",
                f"has {len(self.links)} names for {num_devices} devices; write one name for all links, or "
                f"{num_devices + 1}: driver to first worker, between workers, last worker to driver",
            )
        if len(self.partition) != num_devices:
            raise FieldError(
                "partition",
                f"{self.partition} has {len(self.partition)} stages for {num_devices} devices; "
                "write one range for each device",
            )
        self.partition.check_fits(self.model.num_layers)

    @property
    def num_stages(self) -> int:
        return len(self.devices)

    @classmethod
    def load(cls, path: str | Path) -> ClusterDescription:
        """Read a cluster file (TOML); see ``clusters/`` for the form."""
        return cls.of(Table.load(path, "a cluster file (TOML)"))

    @classmethod
    def parse(cls, text: str, source_name: str) -> ClusterDescription:
        """Read the text of a cluster file; ``source_name`` stands in errors, and its stem is the default name."""
        return cls.of(Table.parse(text, source_name))

    @classmethod
    def of(cls, root: Table) -> ClusterDescription:
        """Read the root of a cluster file."""
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
        name = root.text_of("name", default=Path(root.source_name).stem)
        try:
            if pipeline.partition is None:
                partition = Partition.even(model.num_layers, len(stage_devices))
            else:
                partition = Partition.parse(pipeline.partition)
            return cls(name, model, stage_devices, stage_links, control, partition, published, ours, tensor_parallel)
        except FieldError as error:
            raise table.error(error.field, str(error)) from None
        except UsageError as error:
            key = "devices" if pipeline.partition is None else "partition"
            raise table.error(key, f"{key}: {error}") from None

    def stage_s(self, stage_index: int, num_rows: int, context_len: int, num_taps: int = 0) -> float:
        """Seconds of one forward of a stage, counted from 0.

        ``num_taps``: matrices of H x H that it multiplies by for a draft that reads its layers.
        """
        taps = num_taps * self.model.hidden_size**2 / self.model.read_params(1)  # in layers
        num_layers = len(self.partition.stages[stage_index]) + taps
        return self.devices[stage_index].forward_s(self.model, num_layers, num_rows, context_len)

    def with_bandwidth(self, mbps: float) -> ClusterDescription:
        """The same cluster with this bandwidth on every link."""
        links = tuple(replace(link, bandwidth_mbps=mbps) for link in self.links)
        return replace(self, links=links, control=replace(self.control, bandwidth_mbps=mbps))

    def with_latency(self, latency_ms: float) -> ClusterDescription:
        """The same cluster with this latency on every link."""
        links = tuple(replace(link, latency_ms=latency_ms) for link in self.links)
        return replace(self, links=links, control=replace(self.control, latency_ms=latency_ms))

    def with_stages(self, num_stages: int) -> ClusterDescription:
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


@dataclass(frozen=True)
class _Pipeline:
    """The table ``[pipeline]`` as written."""

    devices: _Names
    links: Annotated[str, "a name"] | _Names
    control: str | None = None
    partition: str | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "links"):
            if not getattr(self, name):
                raise FieldError(name, "is empty; name at least one")

    @property
    def link_names(self) -> tuple[str, ...]:
        return (self.links,) * (len(self.devices) + 1) if isinstance(self.links, str) else self.links
