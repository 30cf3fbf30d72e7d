"""safetensors files: one tensor read, or a whole file written. A failure is a ``ModelError`` that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowspec.core import DType
from flowspec.errors import ModelError, first_line

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# With those of which a quantised checkpoint has the parts of its weights.
KINDS = FLOATS | {
    "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NARROW: dict[str, DType] = {"F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are in a file."""

    path: Path
    offset: int
    num_bytes: int
    kind: str  # of its numbers
    shape: tuple[int, ...]

    @property
    def float_dtype(self) -> DType:
        """The narrowest that holds its numbers, or what its codes mean."""
        return NARROW.get(self.kind, "float32")

    def read(self, start: int, num_bytes: int) -> bytes:
        """So many of its bytes. Raises ``ModelError`` where the file cannot be read, or has changed."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start)
                data = file.read(num_bytes)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({first_line(error)}); is it still there?") from error
        if len(data) < num_bytes:
            raise ModelError(f"{self.path} has become shorter; start again with files that nobody writes")
        return data


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file, by name, without reading one; raises ``ModelError`` for a broken file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length if length <= _MAX_HEADER_BYTES else 0))
        header.pop("__metadata__", None)
        found: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found[name] = StoredTensor(path, 8 + length + start, end - start, entry["dtype"], tuple(entry["shape"]))
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is truncated or damaged ({first_line(error)}); download or copy it again") from error


def read_stored(stored: StoredTensor, dtype: DType | None, device: torch.device | str) -> Tensor:
    """One that lies there alone, in private memory; ``dtype`` as of ``read_tensor``. Raises ``ModelError``."""
    if dtype is not None:
        check_float(stored.path, "what it holds", KINDS[stored.kind])
    try:
        values = torch.from_numpy(np.fromfile(stored.path, np.uint8)).view(KINDS[stored.kind])
        return values.reshape(stored.shape).to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{stored.path} cannot be read ({first_line(error)}); delete it") from error


def open_tensors(path: Path) -> safe_open:
    """A safetensors file; raises ``ModelError`` for a broken one."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is truncated or damaged ({first_line(error)}); download or copy it again") from error


def read_tensor(path: Path, name: str, dtype: DType | None, device: torch.device | str) -> Tensor:
    """One tensor of a safetensors file, in private memory. Raises ``ModelError`` for a broken file.

    Floats are converted to the ``dtype``, and nothing else will do; ``None`` takes what there is.
    """
    # Opened for each tensor, since the pages of a mapped file count as the process's memory until it is closed.
    with open_tensors(path) as file:
        try:
            tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(
                f"{path}: tensor {name} cannot be read ({first_line(error)}); download or copy the model again"
            ) from error
        if dtype is None:
            return tensor.to(device=device, copy=True)
        check_float(path, f"tensor {name}", tensor.dtype)
        return tensor.to(device=device, dtype=getattr(torch, dtype), copy=True)


def check_float(path: Path, what: str, dtype: torch.dtype) -> None:
    """Raise ``ModelError`` for numbers that mean nothing without others."""
    if dtype not in FLOATS.values():
        raise ModelError(
            f"{path}: {what} has type {dtype}, of which config.json says nothing; download or copy the model again"
        )


def save_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file, which is replaced at once or not at all; ``dtype``: of its floats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files that only their owner may read
    os.replace(partial, path)
