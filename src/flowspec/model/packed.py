"""Weights of linear layers as compiled kernels read them: in 8 or 4 bits, or in floats. Makes no product.

A row's inputs are cut into groups, each with a scale of its own: ``weight = (code - zero point) * scale``, or, as files
have them, too, ``code * scale + offset``. This holds what GGUF's Q8_0, Q4_0 and Q4_1 hold, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.core import DType
from flowspec.errors import ModelError

Bits = Literal[8, 4]
Precision: TypeAlias = Bits | DType  # of weights

GROUP = 32  # inputs that share a scale, as in GGUF
# How kernels tell weights apart.
NUM_KINDS = 6
WITH_ZEROS, WITH_OFFSETS, EIGHT_BITS, BFLOAT16, FLOAT16, FLOAT32 = range(NUM_KINDS)
FLOAT_KINDS = BFLOAT16, FLOAT16, FLOAT32
_FLOATS = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}

_CHUNK = 4096  # rows that are packed at once: a large matrix in float32 may not fit beside its original


@dataclass(frozen=True)
class PackedWeight:
    """The weight [N, K] of a linear layer."""

    codes: NDArray[Any]  # [N, groups, K / groups]: int8, or uint8 below 16 where there are zero points or offsets
    scales: NDArray[np.float16]  # [N, groups, 1]; may be negative
    zero_points: NDArray[np.uint8] | None = None  # [N, groups, 1], of 4 bits; with 8 bits there are none
    offsets: NDArray[np.float16] | None = None  # [N, groups, 1], instead of zero points

    @property
    def bits(self) -> Bits:
        return 8 if self.zero_points is None and self.offsets is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        rows, groups, size = self.codes.shape
        return rows, groups * size

    @property
    def kind(self) -> int:
        if self.bits == 8:
            return EIGHT_BITS
        return WITH_ZEROS if self.offsets is None else WITH_OFFSETS

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """As a kernel holds it."""
        return (
            self.codes.size * self.bits // 8 + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)
        )

    def rows(self, indices: NDArray[np.int64]) -> PackedWeight:
        """Some of them."""
        zero_points = None if self.zero_points is None else self.zero_points[indices]
        offsets = None if self.offsets is None else self.offsets[indices]
        return PackedWeight(self.codes[indices], self.scales[indices], zero_points, offsets)

    def divided(self, divisor: float) -> PackedWeight:
        """By a number, as far as float16 holds the scales."""
        scales = (self.scales / np.float32(divisor)).astype(np.float16)
        offsets = None if self.offsets is None else (self.offsets / np.float32(divisor)).astype(np.float16)
        return PackedWeight(self.codes, scales, self.zero_points, offsets)

    def with_offsets(self) -> PackedWeight:
        """Instead of zero points, as float16 holds them."""
        if self.zero_points is None:
            return self
        offsets = (self.zero_points * -self.scales.astype(np.float32)).astype(np.float16)
        return PackedWeight(self.codes, self.scales, offsets=offsets)

    def unpacked(self) -> Tensor:
        """float32 [N, K]: exactly what the codes mean."""
        codes = self.codes.astype(np.float32)
        if self.zero_points is not None:
            codes -= self.zero_points
        codes *= self.scales.astype(np.float32)
        if self.offsets is not None:
            codes += self.offsets
        return torch.from_numpy(codes.reshape(self.shape))


@dataclass(frozen=True)
class FloatWeight:
    """The weight [N, K] of a linear layer as it is."""

    values: Tensor  # float32, bfloat16 or float16, on the processor

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        num_outputs, num_inputs = self.values.shape
        return num_outputs, num_inputs

    @property
    def kind(self) -> int:
        return next(kind for kind, dtype in _FLOATS.items() if dtype == self.values.dtype)

    @property
    def bits(self) -> int:
        return 8 * self.values.itemsize

    @property
    def group_size(self) -> int:
        """As if there were scales."""
        return _group_size(self.shape[1])

    def rows(self, indices: NDArray[np.int64]) -> FloatWeight:
        """Some of them."""
        return FloatWeight(self.values[torch.from_numpy(indices)])


Weight: TypeAlias = PackedWeight | FloatWeight


def pack(weight: Tensor, bits: Bits, name: str = "weight") -> PackedWeight:
    """Round a float weight [N, K]: no entry moves by more than half a scale, give or take the float16 of the scale.

    8 bits are symmetric, 4 bits have zero points. Raises ``ModelError`` for 4 bits where groups do not fit.
    """
    num_inputs = weight.shape[1]
    if num_inputs % GROUP and bits == 4:
        raise ModelError(
            f"{name} has {num_inputs} inputs, which 4-bit kernels cannot take in groups of {GROUP}; use int8 weights"
        )
    size = _group_size(num_inputs)
    rounded = _rounded_8 if bits == 8 else _rounded_4
    parts = [rounded(rows.detach().float().reshape(len(rows), -1, size)) for rows in weight.split(_CHUNK)]
    codes, scales, zero_points = zip(*parts, strict=True)
    return PackedWeight(
        np.concatenate(codes), np.concatenate(scales), None if bits == 8 else np.concatenate(zero_points)
    )


def _group_size(num_inputs: int) -> int:
    """What shares a scale where nobody has said so: all inputs that are no whole groups."""
    return num_inputs if num_inputs % GROUP else GROUP


def _rounded_8(groups: Tensor) -> tuple[Any, Any, Any]:
    scales = _as_half(groups.abs().amax(dim=2, keepdim=True) / 127)
    codes = (groups / _divisors(scales)).round_().clamp_(-127, 127).to(torch.int8)
    return codes.numpy(), scales.numpy(), None


def _rounded_4(groups: Tensor) -> tuple[Any, Any, Any]:
    # Zero is always a code, so that the zero point is one too.
    low = groups.amin(dim=2, keepdim=True).clamp_(max=0)
    high = groups.amax(dim=2, keepdim=True).clamp_(min=0)
    scales = _as_half((high - low) / 15)
    zero_points = (-low / _divisors(scales)).round_().clamp_(0, 15)
    codes = ((groups / _divisors(scales)).round_() + zero_points).clamp_(0, 15).to(torch.uint8)
    return codes.numpy(), scales.numpy(), zero_points.to(torch.uint8).numpy()


def _as_half(scales: Tensor) -> Tensor:
    """Rounded up, so that the codes of the largest entries are not cut off."""
    halves = scales.half()
    return torch.where(halves.float() < scales, torch.nextafter(halves, torch.full_like(halves, torch.inf)), halves)


def _divisors(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales.float(), 1)
