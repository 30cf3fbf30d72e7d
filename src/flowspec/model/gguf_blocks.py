"""Quantised blocks of GGUF files as integer kernels hold them: by their own codes, where they can."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from flowspec.model.packed import GROUP, Bits, PackedWeight

Bytes = NDArray[np.uint8]

_FLOATS = {Kind.F32, Kind.F16, Kind.BF16}
_HELD: dict[Bits, set[Kind]] = {8: {Kind.Q8_0, Kind.Q5_0, Kind.Q4_0}, 4: {Kind.Q4_0, Kind.Q4_1, Kind.Q4_K}}
_SUPER = 256  # inputs of a block of Q4_K


def is_held(kind: Kind, bits: Bits) -> bool:
    """Whether kernels of so many bits hold its codes."""
    return kind in _HELD[bits]


def own_bits(tensors: Mapping[str, tuple[Kind, int]]) -> Bits | None:
    """Of the kernels that lose next to nothing of most of what layers have. ``tensors``: kinds, and numbers of values.

    ``None`` where all are floats. Files of 4 bits, such as Q4_K_M, have some of their matrices in more.
    """
    quantised = [
        (kind, num_values) for name, (kind, num_values) in tensors.items() if ".layers." in name and kind not in _FLOATS
    ]
    if not quantised:
        return None
    num_four = sum(num_values for kind, num_values in quantised if is_held(kind, 4))
    return 4 if 2 * num_four >= sum(num_values for _, num_values in quantised) else 8


def packed_blocks(kind: Kind, raw: Bytes, bits: Bits) -> PackedWeight:
    """Rows [N, bytes of a row] of a kind that kernels of so many bits hold.

    To the bit, but for Q4_K: its scales and offsets are products of a float16 and 6 bits, and are rounded to float16.
    """
    if kind == Kind.Q4_K:
        return _packed_q4_k(raw)
    blocks = raw.reshape(len(raw), -1, gguf.GGML_QUANT_SIZES[kind][1])  # of GROUP inputs each
    scales = blocks[..., :2].copy().view(np.float16)
    if kind == Kind.Q8_0:
        return PackedWeight(blocks[..., 2:].copy().view(np.int8), scales)
    if kind == Kind.Q5_0:
        fifth = np.unpackbits(blocks[..., 2:6], axis=2, bitorder="little")
        return PackedWeight((_nibbles(blocks[..., 6:]) | fifth << 4).astype(np.int8) - np.int8(16), scales)
    if kind == Kind.Q4_1:
        return PackedWeight(_nibbles(blocks[..., 4:]), scales, offsets=blocks[..., 2:4].copy().view(np.float16))
    codes = _nibbles(blocks[..., 2:])
    if bits == 8:
        return PackedWeight(codes.astype(np.int8) - np.int8(8), scales)
    return PackedWeight(codes, scales, np.full(scales.shape, 8, dtype=np.uint8))


def _packed_q4_k(raw: Bytes) -> PackedWeight:
    """A block has factors of its scales and minima, eight of either in 6 bits, and codes, two groups in 32 bytes."""
    blocks = raw.reshape(len(raw), -1, gguf.GGML_QUANT_SIZES[Kind.Q4_K][1])
    num_rows, num_blocks, _ = blocks.shape
    factors = blocks[..., :4].copy().view(np.float16).astype(np.float32)  # [N, blocks, 2]
    scales, minima, mixed = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    # Of the last four groups, the upper 2 bits lie above the 6 bits of the first four.
    scales = np.concatenate([scales & 63, mixed & 15 | scales >> 6 << 4], axis=2)
    minima = np.concatenate([minima & 63, mixed >> 4 | minima >> 6 << 4], axis=2)
    codes = _nibbles(blocks[..., 16:].reshape(num_rows, -1, GROUP))
    groups = num_rows, num_blocks * _SUPER // GROUP
    return PackedWeight(
        codes.reshape(*groups, GROUP),
        (factors[..., :1] * scales).astype(np.float16).reshape(*groups, 1),
        offsets=(factors[..., 1:] * minima * np.float32(-1)).astype(np.float16).reshape(*groups, 1),
    )


def _nibbles(codes: Bytes) -> Bytes:
    """[..., n] -> [..., 2 n]: the lower halves of all bytes, then the upper ones."""
    return np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
