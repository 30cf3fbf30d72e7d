"""The mixture of experts of one layer as compiled kernels read it, which need the weights of chosen experts alone.

The router is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flowspec.model import expert_kernel, layer_kernel
from flowspec.model.compiled_matrix import Floats, Lanes, blocks_of
from flowspec.model.compiled_record import LayerRecord
from flowspec.model.expert_kernel import PART
from flowspec.model.layer_tensors import LayerTensors
from flowspec.model.matrix_kernel import LANES
from flowspec.model.packed import Precision, Weight
from flowspec.model.source import TensorSource


def put_experts(record: LayerRecord, tensors: LayerTensors, name: str, mixture: Any) -> None:
    """``mixture``: transformers' module, without values; ``name``: its own in the layer.

    Raises ``ModelError`` for what the source does not hold, or the kernels do not compute.
    """
    num_experts, hidden_size, inner_size = tensors.shape(f"{name}.experts.down_proj")
    source, prefix = tensors.source, f"{tensors.prefix}{name}."
    is_normed = bool(getattr(mixture.gate, "norm_topk_prob", True))
    record.put(layer_kernel.NUM_EXPERTS, num_experts, int(mixture.gate.top_k), is_normed)
    record.put_array(layer_kernel.ROUTER, _router(source, f"{prefix}gate.weight", tensors.shape(f"{name}.gate.weight")))
    # Where a row's products with the second halves begin, is ``UP``.
    record.put(layer_kernel.IS_GELU, tensors.is_gelu, blocks_of(inner_size) * LANES, inner_size)
    gate_up, down = tensors.shape(f"{name}.experts.gate_up_proj"), (num_experts, hidden_size, inner_size)
    lanes = _lanes_of(source, f"{prefix}experts.gate_up_proj", gate_up, tensors.precision, 2)
    record.put_matrix(layer_kernel.GATE_UP, *lanes)
    record.put_matrix(layer_kernel.DOWN, *_lanes_of(source, f"{prefix}experts.down_proj", down, tensors.precision))


def _lanes_of(
    source: TensorSource, name: str, shape: tuple[int, ...], precision: Precision, num_parts: int = 1
) -> tuple[Lanes, int]:
    """One kind of matrix of all experts, and how many inputs share a scale.

    ``shape`` [experts, N, K]: of the module's tensor ``name``. Its N are so many parts, each of whole blocks.
    """
    height = shape[1] // num_parts
    lanes: Lanes | None = None
    size = 0
    for expert, first, weight in _rows_by_expert(source, name, shape, precision):
        if lanes is None:
            lanes, size = Lanes.like(weight, num_parts * blocks_of(height), shape[0]), weight.group_size
        for part in range(num_parts):
            begin = part * height - first
            if 0 <= begin < weight.shape[0]:
                rows = weight.rows(np.arange(begin, begin + height))
                lanes.of(expert).fill(rows, part * blocks_of(height))
    assert lanes is not None, "there are experts"
    return lanes, size


def _rows_by_expert(
    source: TensorSource, name: str, shape: tuple[int, ...], precision: Precision
) -> Iterator[tuple[int, int, Weight]]:
    """Of a module's tensor [experts, N, K], some rows of one expert at a time, and which of its rows is their first."""
    pieces = source.pieces({name: shape})[name]
    precision = source.precision_of([piece.name for piece in pieces], precision)
    for piece in pieces:
        of_experts, of_rows = piece.place or (slice(None), slice(None))
        experts = range(shape[0])[of_experts] if isinstance(of_experts, slice) else [of_experts]
        rows = range(shape[1])[of_rows] if isinstance(of_rows, slice) else [of_rows]
        weight = source.weight(piece.name, precision)
        source.check_shape(piece.name, weight, (len(experts) * len(rows), shape[2]))
        for place, expert in enumerate(experts):
            yield expert, rows[0], weight.rows(np.arange(place * len(rows), (place + 1) * len(rows)))


def _router(source: TensorSource, name: str, shape: tuple[int, ...]) -> Floats:
    """[experts, H], as ``expert_kernel.route`` reads it."""
    ((_, router),) = source.module_tensors({name: shape}, "float32", "cpu")
    rows = np.pad(router.numpy(), [(0, -shape[0] % expert_kernel.LANES), (0, -shape[1] % PART)])
    by_block = rows.reshape(-1, expert_kernel.LANES, rows.shape[1] // PART, PART)
    return np.ascontiguousarray(by_block.transpose(0, 2, 3, 1))
