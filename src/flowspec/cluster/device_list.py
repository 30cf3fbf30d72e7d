"""The devices of a real cluster, as a TOML file lists them, in pipeline order:

[[device]]
name = "kitchen jetson"
address = "192.168.1.20:7070"   # where `flowspec worker` listens; may be left out where devices are looked for
layers = "0:8"                  # optional: for all devices, or for none
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flowspec.core import Partition
from flowspec.errors import UsageError
from flowspec.toml_table import Table


@dataclass(frozen=True)
class _Device:
    """A table ``[[device]]`` as written."""

    address: Annotated[str | None, '"HOST:PORT"'] = None
    name: str | None = None
    layers: Annotated[str | None, 'a range of layers, as in "0:8"'] = None


@dataclass(frozen=True)
class DeviceList:
    names: tuple[str, ...]
    addresses: tuple[str, ...]  # empty ones where they are to be found by name
    partition: Partition | None  # ``None``: as even as can be

    @classmethod
    def load(cls, path: str | Path, by_name: bool = False) -> DeviceList:
        """``by_name``: devices with names need no addresses.

        Raises ``UsageError`` for a file that is missing or says something else.
        """
        return cls.of(Table.load(path, "a file that lists the devices"), by_name)

    @classmethod
    def of(cls, root: Table, by_name: bool = False) -> DeviceList:
        if "pipeline" in root.values:
            raise root.error(
                "pipeline", "[pipeline] describes a cluster to simulate; one to serve is a list of [[device]]"
            )
        root.check_keys(["device"])
        tables = root.array("device")
        if not tables:
            raise root.error("device", "lists no devices; write [[device]] with an address for each one")
        devices = [table.read(_Device) for table in tables]
        names = tuple(device.name or f"worker {place}" for place, device in enumerate(devices, start=1))
        for device, table in zip(devices, tables, strict=True):
            if device.address is None and not (by_name and device.name):
                raise table.error("address", 'address is missing; add it, "HOST:PORT", or a name for --discover')
        layers = [device.layers for device in devices if device.layers is not None]
        if layers and len(layers) < len(devices):
            raise root.error("device", "layers for some devices only; give them for all, or for none")
        try:
            partition = Partition.parse(",".join(layers)) if layers else None
        except UsageError as error:
            raise root.error("device", str(error)) from None
        return cls(names, tuple(device.address or "" for device in devices), partition)
