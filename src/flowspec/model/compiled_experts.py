"""The mixture of experts of one layer on compiled kernels: it reads the weights of chosen experts alone.

The router is in float32. What a row gets does not depend on the rows beside it, nor on the threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowspec.model import expert_kernel, row_kernel, shared_kernel
from flowspec.model.compiled_matrix import CompiledRows, Floats, Lanes, blocks_of
from flowspec.model.expert_kernel import PART
from flowspec.model.layer_tensors import LayerTensors
from flowspec.model.matrix_kernel import LANES
from flowspec.model.packed import Precision, Weight
from flowspec.model.source import TensorSource
from flowspec.model.team import Mailbox


class CompiledExperts:
    """Of one layer."""

    def __init__(self, tensors: LayerTensors, name: str, mixture: Any) -> None:
        """``mixture``: transformers' module, without values; ``name``: its own in the layer.

        Raises ``ModelError`` for what the source does not hold, or the kernel does not compute.
        """
        self._is_gelu = tensors.is_gelu
        self._num_kept = int(mixture.gate.top_k)
        self._is_normed = bool(getattr(mixture.gate, "norm_topk_prob", True))
        num_experts, hidden_size, inner_size = tensors.shape(f"{name}.experts.down_proj")
        source, prefix = tensors.source, f"{tensors.prefix}{name}."
        self._num_experts, self._inner_size = num_experts, inner_size
        self._router = _router(source, f"{prefix}gate.weight", tensors.shape(f"{name}.gate.weight"))
        self._up = blocks_of(inner_size) * LANES  # where a row's products with the second halves begin
        gate_up, down = tensors.shape(f"{name}.experts.gate_up_proj"), (num_experts, hidden_size, inner_size)
        self._gate_up = _Matrices(source, f"{prefix}experts.gate_up_proj", gate_up, tensors.precision, 2)
        self._down = _Matrices(source, f"{prefix}experts.down_proj", down, tensors.precision)

    @property
    def nbytes(self) -> int:
        return self._router.nbytes + self._gate_up.nbytes + self._down.nbytes

    def __call__(self, rows: Floats, mailbox: Mailbox) -> Floats:
        """[n, H] -> [n, H], with what fills up its last block."""
        num_rows = len(rows)
        chosen = np.empty((num_rows, self._num_kept), np.int64)
        shares = np.empty((num_rows, self._num_kept), np.float32)
        by_part = np.pad(rows, [(0, 0), (0, -rows.shape[1] % PART)]).reshape(num_rows, -1, PART)
        expert_kernel.route(by_part, self._router, self._num_experts, self._is_normed, chosen, shares)
        order = np.argsort(chosen, axis=None, kind="stable")  # pairs of a row and an expert, by expert
        experts, starts = np.unique(chosen.ravel()[order], return_index=True)
        needed = np.append(starts, len(order)), experts
        given = self._gate_up(rows, order // self._num_kept, *needed, mailbox)
        gated = row_kernel.gated(given, self._inner_size, self._up, self._is_gelu)
        given = self._down(gated, np.arange(len(order)), *needed, mailbox)
        products = np.zeros((num_rows, given.shape[1]), np.float32)
        expert_kernel.share_out(given, order, shares, products)
        return products


class _Matrices:
    """One kind of matrix of all experts."""

    def __init__(
        self, source: TensorSource, name: str, shape: tuple[int, ...], precision: Precision, num_parts: int = 1
    ) -> None:
        """``shape`` [experts, N, K]: of the module's tensor ``name``. Its N are so many parts, each of whole blocks."""
        height = shape[1] // num_parts
        lanes: Lanes | None = None
        for expert, first, weight in _rows_by_expert(source, name, shape, precision):
            if lanes is None:
                lanes, self._size = Lanes.like(weight, num_parts * blocks_of(height), shape[0]), weight.group_size
            for part in range(num_parts):
                begin = part * height - first
                if 0 <= begin < weight.shape[0]:
                    rows = weight.rows(np.arange(begin, begin + height))
                    lanes.of(expert).fill(rows, part * blocks_of(height))
        assert lanes is not None, "there are experts"
        self._lanes = lanes

    @property
    def nbytes(self) -> int:
        return self._lanes.nbytes

    def __call__(self, rows: Floats, picked: NDArray[np.int64], starts: Any, experts: Any, mailbox: Mailbox) -> Floats:
        """The ``picked`` [pairs] of some rows [n, K] -> [pairs, N].

        Those from ``starts[j]`` to ``starts[j + 1]`` run through the matrix ``experts[j]``.
        """
        pairs = CompiledRows.of(rows, self._lanes.codes.shape[2], self._size, self._lanes.kind).picked(picked)
        products: Floats = shared_kernel.product_by_expert(mailbox, pairs, starts, experts, tuple(self._lanes))
        return products


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
