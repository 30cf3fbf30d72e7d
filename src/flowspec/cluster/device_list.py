"""The devices of a real cluster, as a TOML file lists them, in pipeline order:

[[device]]
name = "kitchen jetson"
address = "192.168.1.20:7070"   # where `flowspec worker` listens
layers = "0:8"                  # optional: for all devices, or for none
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec.core import Partition
from flowspec.errors import UsageError

if sys.version_info >= (3, 11):
    from tomllib import TOMLDecodeError, loads
else:
    from tomli import TOMLDecodeError, loads  # pyright: ignore[reportMissingImports, reportUnknownVariableType]


@dataclass(frozen=True)
class DeviceList:
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    partition: Partition | None  # ``None``: as even as can be

    @classmethod
    def load(cls, path: str | Path) -> DeviceList:
        """Raises ``UsageError`` for a file that is missing or says something else."""
        try:
            values = loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; give the path of a file that lists the devices") from None
        except (TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: no TOML: {error}") from None
        return cls.of(values, str(path))

    @classmethod
    def of(cls, values: dict[str, Any], path: str) -> DeviceList:
        devices: Any = values.get("device")
        if "pipeline" in values:
            raise UsageError(
                f"{path}: describes a cluster to simulate; one to serve is a list of [[device]] with address"
            )
        if unknown := set(values) - {"device"}:
            raise UsageError(f"{path}: {sorted(unknown)[0]} is unknown; a cluster to serve is a list of [[device]]")
        if not isinstance(devices, list) or not devices or not all(isinstance(device, dict) for device in devices):
            raise UsageError(f"{path}: lists no devices; write [[device]] with an address for each one")
        names: list[str] = []
        addresses: list[str] = []
        layers: list[str] = []
        for place, device in enumerate(devices, start=1):
            if unknown := set(device) - {"name", "address", "layers"}:
                raise UsageError(
                    f"{path}: device {place}: {sorted(unknown)[0]} is unknown; known: name, address, layers"
                )
            if not all(isinstance(value, str) for value in device.values()) or "address" not in device:
                raise UsageError(f'{path}: device {place}: wants address = "HOST:PORT", and texts everywhere')
            names.append(device.get("name", f"worker {place}"))
            addresses.append(device["address"])
            layers += [device["layers"]] if "layers" in device else []
        if layers and len(layers) < len(devices):
            raise UsageError(f"{path}: layers for some devices only; give them for all, or for none")
        return cls(tuple(names), tuple(addresses), Partition.parse(",".join(layers)) if layers else None)
