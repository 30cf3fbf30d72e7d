"""The mixture of experts of one layer in 8 or 4 bits, on a processor: it reads the weights of chosen experts alone.

Rows stay in float32, and the router too. What a row gets does not depend on the rows beside it, nor on the threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flowspec.errors import ModelError
from flowspec.model import expert_kernel
from flowspec.model.expert_kernel import HALF, LANES, PART
from flowspec.model.packed import GROUP, Bits, PackedWeight
from flowspec.model.source import TensorSource


class _Lanes(NamedTuple):
    """One kind of matrix [N, K] of all experts, as the kernel reads it."""

    codes: NDArray[Any]  # [experts, blocks of N, groups of K, parts, PART, LANES]; HALF pairs of 4 bits for PART
    scales: NDArray[np.float32]  # [experts, blocks, groups, LANES]
    zeros: NDArray[np.uint8]  # the same, with 4 bits; else empty

    @classmethod
    def empty(cls, num_experts: int, num_outputs: int, num_inputs: int, bits: Bits) -> _Lanes:
        groups, size = (num_inputs // GROUP, GROUP) if num_inputs % GROUP == 0 else (1, num_inputs)
        per_group = num_experts, -(-num_outputs // LANES), groups
        parts = -(-size // PART)
        lanes = (*per_group, LANES)
        if bits == 8:
            codes = np.zeros((*per_group, parts, PART, LANES), np.int8)
            return cls(codes, np.zeros(lanes, np.float32), np.zeros((0, 0, 0, 0), np.uint8))
        codes = np.zeros((*per_group, parts, HALF, LANES), np.uint8)
        return cls(codes, np.zeros(lanes, np.float32), np.zeros(lanes, np.uint8))

    def fill(self, expert: int, weight: PackedWeight) -> None:
        """With an expert's matrix."""
        self.scales[expert] = _by_lanes(weight.scales)[..., 0, :]
        codes = _by_lanes(weight.codes)  # [blocks, groups, inputs, LANES]
        codes = np.pad(codes, [(0, 0), (0, 0), (0, -codes.shape[2] % PART), (0, 0)])
        codes = codes.reshape(*codes.shape[:2], -1, PART, LANES)
        if weight.zero_points is None:
            self.codes[expert] = codes
        else:
            self.codes[expert] = codes[..., :HALF, :] | (codes[..., HALF:, :] << 4)
            self.zeros[expert] = _by_lanes(weight.zero_points)[..., 0, :]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes


def _by_lanes(values: NDArray[Any]) -> NDArray[Any]:
    """[N, groups, m] -> [blocks, groups, m, LANES], filled up with zeros."""
    values = np.pad(values, [(0, -len(values) % LANES), (0, 0), (0, 0)])
    return values.reshape(-1, LANES, *values.shape[1:]).transpose(0, 2, 3, 1)


def _rows_by_expert(
    source: TensorSource, name: str, shape: tuple[int, ...], bits: Bits
) -> Iterator[tuple[int, int, PackedWeight]]:
    """Of a module's tensor [experts, N, K], some rows of one expert at a time, and which of its rows is their first."""
    for piece in source.pieces({name: shape})[name]:
        of_experts, of_rows = piece.place or (slice(None), slice(None))
        experts = range(shape[0])[of_experts] if isinstance(of_experts, slice) else [of_experts]
        rows = range(shape[1])[of_rows] if isinstance(of_rows, slice) else [of_rows]
        weight = source.packed(piece.name, bits)
        source.check_shape(piece.name, weight, (len(experts) * len(rows), shape[2]))
        for place, expert in enumerate(experts):
            yield expert, rows[0], weight.rows(np.arange(place * len(rows), (place + 1) * len(rows)))


class PackedExperts:
    """Of one layer."""

    def __init__(self, source: TensorSource, prefix: str, mixture: Any, bits: Bits) -> None:
        """``mixture``: transformers' module, without values; ``prefix``: of its tensors' names.

        Raises ``ModelError`` for what the source does not hold, or the kernel does not compute.
        """
        if source.config.hidden_act not in ("silu", "swish"):
            raise ModelError(
                f"{source.name}: its experts are gated by {source.config.hidden_act!r}, which integer kernels do not "
                "know; use --weights float"
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in mixture.named_parameters()}
        num_experts, hidden_size, self._inner_size = shapes["experts.down_proj"]
        self._num_experts, self._num_kept = num_experts, int(mixture.gate.top_k)
        self._is_normed = bool(getattr(mixture.gate, "norm_topk_prob", True))
        name = f"{prefix}gate.weight"
        ((_, router),) = source.module_tensors({name: shapes["gate.weight"]}, "float32", "cpu")
        rows = np.pad(router.numpy(), [(0, -num_experts % LANES), (0, -hidden_size % PART)])
        self._router = np.ascontiguousarray(_by_lanes(rows.reshape(len(rows), -1, PART)))
        self._gate, self._up = (_Lanes.empty(num_experts, self._inner_size, hidden_size, bits) for _ in range(2))
        self._down = _Lanes.empty(num_experts, hidden_size, self._inner_size, bits)
        name = f"{prefix}experts.gate_up_proj"
        for expert, first, weight in _rows_by_expert(source, name, shapes["experts.gate_up_proj"], bits):
            for lanes, begin in ((self._gate, 0), (self._up, self._inner_size)):
                if first <= begin < first + weight.shape[0]:
                    lanes.fill(expert, weight.rows(np.arange(begin, begin + self._inner_size) - first))
        name = f"{prefix}experts.down_proj"
        for expert, _, weight in _rows_by_expert(source, name, shapes["experts.down_proj"], bits):
            self._down.fill(expert, weight)
        self._threads = torch.get_num_threads()

    @property
    def nbytes(self) -> int:
        return self._router.nbytes + self._gate.nbytes + self._up.nbytes + self._down.nbytes

    def add(self, rows: NDArray[np.float32], hidden: NDArray[np.float32]) -> None:
        """Add what the experts make of ``rows`` [n, H] to ``hidden`` [n, H]."""
        num_rows = len(rows)
        chosen = np.empty((num_rows, self._num_kept), np.int64)
        shares = np.empty((num_rows, self._num_kept), np.float32)
        by_part = _filled(rows, 1)[:, 0]
        expert_kernel.route(by_part, self._router, self._num_experts, self._is_normed, chosen, shares)
        order = np.argsort(chosen, axis=None, kind="stable")  # pairs of a row and an expert, by expert
        experts, starts = np.unique(chosen.ravel()[order], return_index=True)
        needed = order, np.append(starts, len(order)), experts
        grouped = _filled(rows, self._gate.codes.shape[2])
        inner = np.zeros((len(order), self._inner_size), np.float32)
        self._in_parts(expert_kernel.gate, (grouped, _sums(grouped), *needed), (self._gate, self._up, inner))
        grouped = _filled(inner, self._down.codes.shape[2])
        self._in_parts(expert_kernel.down, (grouped, _sums(grouped), shares.ravel(), *needed), (self._down, hidden))

    def _in_parts(self, kernel: Any, what: tuple[Any, ...], whereto: tuple[Any, ...]) -> None:
        """Blocks of outputs are shared out among threads."""
        if self._threads == 1:
            kernel(*what, 0, 1, *whereto)
            return
        parts = [_pool(self._threads).submit(kernel, *what, n, self._threads, *whereto) for n in range(self._threads)]
        for part in parts:
            part.result()


def _filled(rows: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """[n, K] -> [n, groups, parts, PART], each group filled up with zeros."""
    grouped = rows.reshape(len(rows), groups, -1)
    missing = -grouped.shape[2] % PART
    if missing:
        grouped = np.pad(grouped, [(0, 0), (0, 0), (0, missing)])
    return grouped.reshape(len(rows), groups, -1, PART)


def _sums(grouped: NDArray[np.float32]) -> NDArray[np.float32]:
    sums = np.empty(grouped.shape[:2], np.float32)
    expert_kernel.sum_groups(grouped, sums)
    return sums


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="experts")
