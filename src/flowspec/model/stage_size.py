"""What a stage takes of a device's memory, by the shapes of its tensors: known before one of them is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from flowspec.core import DType, LayerRange, Weights
from flowspec.model.families import EMBEDDING, LM_HEAD
from flowspec.model.loader import Checkpoint
from flowspec.model.packed import GROUP
from flowspec.model.tensor_files import NARROW

_ROUTER = ".gate.weight"  # in names of a mixture's tensors, in files and modules
_LANES = 16  # outputs of a block, as ``vector_code`` has them, which needs numba; a matrix has an even number
_NUM_BITS: dict[Weights, int] = {"int8": 8, "int4": 4}
_SAME_ROWS = re.compile(r"(?<=self_attn\.)[qkv]_|(?<=mlp\.)(gate|up)_")  # of matrices that are one of integer kernels


class StageShapes(NamedTuple):
    """Of a stage's tensors."""

    by_name: Mapping[str, tuple[int, ...]]  # transformers' names
    wide: frozenset[str] = frozenset()  # what has 8 bits where others have 4; see ``TensorSource.bits_of``
    narrow: frozenset[str] = frozenset()  # what is stored in floats of 16 bits

    @property
    def hidden_size(self) -> int:
        """Of the model; 0 where no layer says it."""
        return next((shape[0] for name, shape in self.by_name.items() if name.endswith("input_layernorm.weight")), 0)

    def with_lm_head(self) -> StageShapes:
        """Of a stage that has the lm_head too: where the embedding is that, it is there twice."""
        if LM_HEAD in self.by_name:
            return self
        narrow = self.narrow | {LM_HEAD} if EMBEDDING in self.narrow else self.narrow
        return self._replace(by_name={**self.by_name, LM_HEAD: self.by_name[EMBEDDING]}, narrow=narrow)


def shapes_of(checkpoint: Checkpoint, layers: LayerRange, with_lm_head: bool = False) -> StageShapes:
    """Of a stage whose files are here. Raises ``ModelError`` as reading them does, and for layers it has not."""
    checkpoint.check_range(layers)
    names = checkpoint.names_of_stage(layers)
    if with_lm_head:
        names += checkpoint.parts_of(checkpoint.lm_head_name)
    found = {name: checkpoint.stored(name) for name in names}
    stored = {name: tensor for name, tensor in found.items() if tensor is not None}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    shapes = shapes if checkpoint.layout is None else checkpoint.layout.weight_shapes(shapes)
    wide = frozenset(name for name in shapes if checkpoint.bits_of([name], 4) == 8)
    narrow = frozenset(name for name, tensor in stored.items() if tensor.kind in NARROW)
    return StageShapes(shapes, wide, narrow)


def stage_bytes(
    shapes: StageShapes, dtype: DType, weights: Weights, is_compiled: bool = False, has_logits: bool = False
) -> int:
    """As ``Stage.weights_bytes`` says once it is loaded, with 4 bits at most a tenth more.

    ``is_compiled``: whether floats are as narrow as they are stored. ``has_logits``: whether the lm_head is
    ``backends.load_head``'s, of 8 bits where ``weights`` are integers; hints have theirs in floats.
    """
    wide = {_SAME_ROWS.sub("", name) for name in shapes.wide}
    full = {_SAME_ROWS.sub("", name) for name in shapes.by_name.keys() - shapes.narrow}
    may_be_narrow = dtype == "float32" and (is_compiled or weights in _NUM_BITS)  # the embedding of integers, too
    total = 0
    odd: dict[str, int] = {}  # what a block more takes of matrices that have an odd number so far
    for name, shape in shapes.by_name.items():
        together = _SAME_ROWS.sub("", name)
        own_weights = weights
        if name == LM_HEAD and not has_logits:
            own_weights = "float"
        elif weights == "int4" and (name == LM_HEAD or together in wide):
            own_weights = "int8"
        if not _is_packed(name, shape, own_weights):
            own_dtype: DType = "bfloat16" if may_be_narrow and together not in full else dtype
            total += _float_bytes(name, shape, own_dtype, own_weights)
            continue
        num_blocks, of_block = -(-shape[-2] // _LANES), math.prod(shape[:-2]) * _block_bytes(shape[-1], own_weights)
        total += num_blocks * of_block
        if num_blocks % 2 and odd.pop(together, None) is None:
            odd[together] = of_block
    return total + sum(odd.values())


def _is_packed(name: str, shape: tuple[int, ...], weights: Weights) -> bool:
    """Whether a tensor is a matrix of integer kernels."""
    return weights in _NUM_BITS and len(shape) >= 2 and name != EMBEDDING and not name.endswith(_ROUTER)


def _block_bytes(num_inputs: int, weights: Weights) -> int:
    """As ``compiled_matrix`` has a block: inputs filled up, a scale for each group, a bias for each output.

    What 4 bits have beside the scale is a zero point, or an offset, which takes more.
    """
    num_groups = -(-num_inputs // GROUP)
    per_group = GROUP * _NUM_BITS[weights] // 8 + torch.float16.itemsize * (2 if weights == "int4" else 1)
    return _LANES * (num_groups * per_group + torch.float32.itemsize)


def _float_bytes(name: str, shape: tuple[int, ...], dtype: DType, weights: Weights) -> int:
    """``weights``: of the layer."""
    if weights not in _NUM_BITS or name == EMBEDDING:
        return math.prod(shape) * getattr(torch, dtype).itemsize
    # Norms and routers of integer kernels are in float32; a bias is counted with its matrix.
    return 0 if name.endswith(".bias") else math.prod(shape) * torch.float32.itemsize
