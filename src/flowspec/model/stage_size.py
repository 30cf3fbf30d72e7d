"""What a stage takes of a device's memory, by the shapes of its tensors: known before one of them is read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from flowspec.core import DType, Weights
from flowspec.model.families import EMBEDDING, LM_HEAD
from flowspec.model.packed import GROUP

_ROUTER, _EXPERTS = ".gate.weight", ".experts."  # in names of a mixture's tensors, in files and modules
_NUM_BITS: dict[Weights, int] = {"int8": 8, "int4": 4}


def stage_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: DType, weights: Weights) -> int:
    """As ``Stage.weights_bytes`` says once it is loaded. ``shapes``: by transformers' names."""
    return sum(_tensor_bytes(name, shape, dtype, weights) for name, shape in shapes.items())


def _tensor_bytes(name: str, shape: tuple[int, ...], dtype: DType, weights: Weights) -> int:
    num_values = math.prod(shape)
    if weights not in _NUM_BITS or name in (EMBEDDING, LM_HEAD):
        return num_values * getattr(torch, dtype).itemsize
    if len(shape) < 2 or name.endswith(_ROUTER):  # norms, biases and routers of integer kernels are in float32
        return num_values * torch.float32.itemsize
    group = shape[-1] if shape[-1] % GROUP else GROUP
    per_group = torch.float16.itemsize
    if _EXPERTS in name:
        per_group = torch.float32.itemsize + (1 if weights == "int4" else 0)  # a zero point beside the scale
    return num_values * _NUM_BITS[weights] // 8 + num_values // max(1, group) * per_group
