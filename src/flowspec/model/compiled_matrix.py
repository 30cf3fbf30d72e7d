"""Matrices on the compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flowspec.errors import ModelError
from flowspec.model import layer_kernel, matrix_kernel
from flowspec.model.matrix_kernel import LANES
from flowspec.model.packed import (
    FLOAT_KINDS,
    GROUP,
    WITH_OFFSETS,
    WITH_ZEROS,
    FloatWeight,
    PackedWeight,
    Weight,
)
from flowspec.model.team import Mailbox
from flowspec.model.team_kernel import multiplier, multiplier_by_expert
from flowspec.model.tile_code import BLOCKS

Floats = NDArray[np.float32]


class Lanes(NamedTuple):
    """A matrix as the kernel reads it, or several of one shape, each with an index in front."""

    codes: NDArray[np.uint8]  # [blocks, groups, bytes]: above zero; with 4 bits two in a byte; or floats. Whole tiles
    scales: NDArray[np.uint16]  # [blocks, groups, LANES]: the bits of float16; none with floats
    zeros: NDArray[np.uint8]  # [blocks, groups, LANES]; none with 8 bits, or with offsets
    offsets: NDArray[np.uint16]  # the same, as float16: what is added to the products of codes and scales, if any
    biases: Floats  # [blocks, LANES]
    kind: int  # of ``packed``'s
    multiplier: int  # the address of the kernel that multiplies with them

    @classmethod
    def like(cls, weight: Weight, num_blocks: int, *front: int) -> Lanes:
        """Of zeros, for such weights, in blocks that make whole tiles. ``front``: how many."""
        num_blocks += -num_blocks % BLOCKS
        num_groups = weight.shape[1] // weight.group_size * groups_of(weight.group_size)
        lanes, none = (*front, num_blocks, num_groups, LANES), (*front, 0, 0, 0)
        return cls(
            _zeros((*front, num_blocks, num_groups, LANES * GROUP * weight.bits // 8), np.uint8),
            _zeros(none if weight.kind in FLOAT_KINDS else lanes, np.uint16),
            _zeros(lanes if weight.kind == WITH_ZEROS else none, np.uint8),
            _zeros(lanes if weight.kind == WITH_OFFSETS else none, np.uint16),
            _zeros((*front, num_blocks, LANES), np.float32),
            weight.kind,
            multiplier_by_expert(weight.kind) if front else multiplier(weight.kind),
        )

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self[:-2])

    def of(self, index: int) -> Lanes:
        """One of several."""
        codes, scales, zeros, offsets, biases, *rest = self
        return Lanes(codes[index], scales[index], zeros[index], offsets[index], biases[index], *rest)

    def fill(self, weight: Weight, first: int = 0, bias: Floats | None = None) -> None:
        """Write a weight's rows into the blocks from ``first`` on, and their biases.

        Raises ``ModelError`` for a weight with offsets where there are zero points.
        """
        num_outputs, blocks = weight.shape[0], slice(first, first + blocks_of(weight.shape[0]))
        if isinstance(weight, FloatWeight):
            assert weight.kind == self.kind, "none is rounded here"
            self.codes[blocks] = _float_lanes(weight).reshape(self.codes[blocks].shape)
        else:
            self._fill_packed(weight, blocks)
        if bias is not None:
            self.biases[blocks].reshape(-1)[:num_outputs] = bias

    def _fill_packed(self, weight: PackedWeight, blocks: slice) -> None:
        if self.kind == WITH_OFFSETS:
            weight = weight.with_offsets()
        elif weight.offsets is not None:
            raise ModelError("some experts have 4-bit codes with zero points, others with offsets; use int8 weights")
        groups = groups_of(weight.group_size)
        matrix_kernel.lay_out(weight.codes, groups, self.codes[blocks])
        self.scales[blocks] = _by_lanes(weight.scales.view(np.uint16), groups)
        if weight.zero_points is not None:
            self.zeros[blocks] = _by_lanes(weight.zero_points, groups)
        if weight.offsets is not None:
            self.offsets[blocks] = _by_lanes(weight.offsets.view(np.uint16), groups)


class CompiledMatrix:
    """The weights of one linear layer, or of several that read the same rows."""

    def __init__(self, parts: Sequence[Weight], biases: Sequence[Floats | None] = ()) -> None:
        """``parts`` [N, K] each, of as many bits or one type: the outputs of each begin at its one of ``starts``."""
        first = next((part for part in parts if part.kind == WITH_OFFSETS), parts[0])
        self.num_inputs = first.shape[1]
        heights = [blocks_of(part.shape[0]) for part in parts]
        blocks = [sum(heights[:index]) for index in range(len(parts))]
        self.starts = tuple(block * LANES for block in blocks)
        self.size = first.group_size
        self.lanes = Lanes.like(first, sum(heights))
        for part, block, bias in zip(parts, blocks, biases or [None] * len(parts), strict=True):
            self.lanes.fill(part, block, bias)

    @property
    def nbytes(self) -> int:
        return self.lanes.nbytes

    def __call__(self, rows: Floats, mailbox: Mailbox) -> Floats:
        """[n, K] -> [n, N], each part's outputs filled up to a block, and all to whole tiles."""
        products: Floats = layer_kernel.product_of(mailbox, rows, self.size, tuple(self.lanes))
        return products


def blocks_of(num_outputs: int) -> int:
    return -(-num_outputs // LANES)


def groups_of(size: int) -> int:
    """That as many inputs with one scale are cut into."""
    return -(-size // GROUP)


def _by_lanes(values: NDArray[Any], groups: int) -> NDArray[Any]:
    """[N, scales, 1] -> [blocks, scales * groups, LANES], filled up with zeros."""
    values = np.pad(values[..., 0], [(0, -len(values) % LANES), (0, 0)]).repeat(groups, axis=1)
    return values.reshape(-1, LANES, values.shape[1]).transpose(0, 2, 1)


def _float_lanes(weight: FloatWeight) -> NDArray[np.uint8]:
    """[N, K] -> the bytes of [blocks, inputs, LANES], filled up with zeros."""
    values, size = weight.values, weight.group_size
    values = torch.nn.functional.pad(
        values.view(len(values), -1, size), (0, -size % GROUP, 0, 0, 0, -len(values) % LANES)
    )
    by_lanes = values.reshape(-1, LANES, values.shape[1] * values.shape[2]).transpose(1, 2).contiguous()
    return by_lanes.view(torch.uint8).numpy()


def _zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Whose place in memory suits the kernel, as numpy's own need not."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return torch.zeros(num_bytes, dtype=torch.uint8).numpy().view(dtype).reshape(shape)
