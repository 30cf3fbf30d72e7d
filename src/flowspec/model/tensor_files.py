"""safetensors files: one tensor read, or a whole file written. A failure is a ``ModelError`` that names the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowspec.core import DType
from flowspec.errors import ModelError, first_line


def open_tensors(path: Path) -> safe_open:
    """A safetensors file; raises ``ModelError`` for a broken one."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is truncated or damaged ({first_line(error)}); download or copy it again") from error


def read_tensor(path: Path, name: str, dtype: DType, device: torch.device | str) -> Tensor:
    """One tensor of a safetensors file, converted, in private memory; raises ``ModelError`` for a broken file."""
    # Opened for each tensor, since the pages of a mapped file count as the process's memory until it is closed.
    with open_tensors(path) as file:
        try:
            tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(
                f"{path}: tensor {name} cannot be read ({first_line(error)}); download or copy the model again"
            ) from error
        if not tensor.is_floating_point():
            raise ModelError(f"{path}: tensor {name} has type {tensor.dtype}; only float checkpoints are supported")
        return tensor.to(device=device, dtype=getattr(torch, dtype), copy=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file, which is replaced at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files that only their owner may read
    os.replace(partial, path)
