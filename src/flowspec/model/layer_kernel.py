"""All of a layer but attention and experts, compiled by numba: as few calls as there can be."""

from __future__ import annotations

from flowspec.model.compiled import compiled
from flowspec.model.integer_kernel import product
from flowspec.model.row_kernel import add, gated, normalised, turn


@compiled
def write_heads(hidden, matrix, size, starts, norm, head_norms, eps, cos, sin, width, heads):
    """Rows [n, H] before a layer -> what attention reads, as ``turn`` writes it. ``size``: as of ``quantise``."""
    turn(product(normalised(hidden, norm, eps), size, matrix), starts, head_norms, eps, cos, sin, width, heads)


@compiled
def add_rest(
    hidden, attended, output, output_size, gate_up, gate_up_size, up, is_gelu, down, down_size, num_inner, norms, eps,
    multiplier,
):  # fmt: skip
    """Rows [n, H] before a layer, which are written, and what they attended to [n, heads * d]."""
    add(product(attended, output_size, output), norms[1], eps, multiplier, hidden)
    given = product(normalised(hidden, norms[2], eps), gate_up_size, gate_up)
    given = product(gated(given, num_inner, up, is_gelu), down_size, down)
    add(given, norms[3], eps, multiplier, hidden)
