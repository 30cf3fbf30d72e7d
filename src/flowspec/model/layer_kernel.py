"""All of a layer but attention and experts, compiled by numba: as few calls as there can be."""

from __future__ import annotations

from flowspec.model.compiled import compiled
from flowspec.model.shared_kernel import add_rows, product, taken, taken_gates, turn_rows


@compiled
def write_heads(box, hidden, matrix, size, starts, norm, head_norms, eps, cos, sin, width, heads):
    """Rows [n, H] before a layer -> what attention reads, as ``turn`` writes it. ``size``: as of ``take``."""
    products = product(box, taken(box, hidden, norm, eps, size, matrix), matrix)
    turn_rows(box, products, starts, head_norms, eps, cos, sin, width, heads)


@compiled
def add_attended(box, hidden, attended, output, size, norms, eps, multiplier):
    """To rows [n, H] before a layer what they attended to [n, heads * d], times the ``output`` matrix."""
    products = product(box, taken(box, attended, norms[1][:0], eps, size, output), output)
    add_rows(box, products, norms[1], eps, multiplier, hidden)


@compiled
def add_rest(
    box, hidden, attended, output, output_size, gate_up, gate_up_size, up, is_gelu, down, down_size, num_inner, norms,
    eps, multiplier,
):  # fmt: skip
    """Rows [n, H] before a layer, which are written, and what they attended to [n, heads * d]."""
    add_attended(box, hidden, attended, output, output_size, norms, eps, multiplier)
    given = product(box, taken(box, hidden, norms[2], eps, gate_up_size, gate_up), gate_up)
    inner = taken_gates(box, given, num_inner, up, is_gelu, down_size, down)
    add_rows(box, product(box, inner, down), norms[3], eps, multiplier, hidden)


@compiled
def product_of(box, rows, size, matrix):
    """Rows [n, K] times a matrix -> [n, blocks * LANES]. ``size``: as of ``take``."""
    biases = matrix[4]
    no_norm, eps = biases.ravel()[:0], biases.dtype.type(0)
    return product(box, taken(box, rows, no_norm, eps, size, matrix), matrix)
