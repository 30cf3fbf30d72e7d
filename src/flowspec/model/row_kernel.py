"""What a layer does with rows between its products, in float32, compiled by numba: each row by itself.

Loops are written for the compiler, as in ``slot_kernel``: sums are made in lanes.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.vector_code import LANES, as_float, fused

LOG2_E = 1.4426950408889634
LOWEST = np.float32(-126)  # the exponent of the smallest normal number, which is nothing beside a 1

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_LN_2 = np.float32(0.6931471805599453)
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)


@compiled
def _inverse_norm(rows, i, begin, count, eps, lanes):
    lanes[:] = 0
    full = begin + count // LANES * LANES
    for j in range(begin, full, LANES):
        for lane in range(LANES):
            lanes[lane] = fused(rows[i, j + lane], rows[i, j + lane], lanes[lane])
    for j in range(full, begin + count):
        lanes[j - full] = fused(rows[i, j], rows[i, j], lanes[j - full])
    total = _ZERO
    for lane in range(LANES):
        total += lanes[lane]
    return _ONE / np.sqrt(total / np.float32(count) + eps)


@compiled
def normalised(rows, weight, eps):
    """Rows [n, K] by their root mean squares, times ``weight`` [K]."""
    lanes = np.empty(LANES, np.float32)
    found = np.empty(rows.shape, np.float32)
    for i in range(len(rows)):
        factor = _inverse_norm(rows, i, 0, rows.shape[1], eps, lanes)
        for j in range(rows.shape[1]):
            found[i, j] = rows[i, j] * factor * weight[j]
    return found


@compiled
def add(products, weight, eps, multiplier, hidden):
    """Add ``products`` [n, >= H] times ``multiplier`` to ``hidden`` [n, H], normalised before if a ``weight`` has H."""
    lanes = np.empty(LANES, np.float32)
    for i in range(len(hidden)):
        if len(weight):
            factor = _inverse_norm(products, i, 0, hidden.shape[1], eps, lanes)
            for j in range(hidden.shape[1]):
                hidden[i, j] += products[i, j] * factor * weight[j] * multiplier
        else:
            for j in range(hidden.shape[1]):
                hidden[i, j] += products[i, j] * multiplier


@compiled
def power_of_2(x):
    """2 ** x, x from -126 to 126: of its nearest whole number by a float's bits, of the rest by its Taylor series."""
    whole = np.floor(x + _HALF)
    rest = (x - whole) * _LN_2
    series = fused(rest, np.float32(1 / 5040), np.float32(1 / 720))
    series = fused(series, rest, np.float32(1 / 120))
    series = fused(series, rest, np.float32(1 / 24))
    series = fused(series, rest, np.float32(1 / 6))
    series = fused(series, rest, _HALF)
    series = fused(series, rest, _ONE)
    series = fused(series, rest, _ONE)
    return series * as_float(np.int32((np.int32(whole) + _BIAS) << _MANTISSA_BITS))


@compiled
def exp(x):
    """e ** x, x up to 87; below -87 as of that."""
    return power_of_2(min(max(x * np.float32(LOG2_E), LOWEST), -LOWEST))


@compiled
def gated(products, size, up, is_gelu):
    """f(gate) * up, [n, size], f being SiLU, or GELU as tanh approximates it.

    ``products`` [n, ...]: gates from column 0 on, what they let through from ``up`` on.
    """
    found = np.empty((len(products), size), np.float32)
    for i in range(len(products)):
        for j in range(size):
            x = products[i, j]
            t = x
            if is_gelu:  # x * (1 + tanh(t / 2)) / 2, which is x / (1 + exp(-t))
                t = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
            found[i, j] = x / (_ONE + exp(-t)) * products[i, up + j]
    return found


@compiled
def _turn(products, begin, norm, eps, cos, sin, width, heads):
    lanes = np.empty(LANES, np.float32)
    half, size = width // 2, heads.shape[2]
    for i in range(heads.shape[0]):
        for h in range(heads.shape[1]):
            first = begin + h * size
            if len(norm):
                factor = _inverse_norm(products, i, first, size, eps, lanes)
                for d in range(size):
                    products[i, first + d] *= factor * norm[d]
            for d in range(half):
                low, high = products[i, first + d], products[i, first + half + d]
                heads[i, h, d] = low * cos[i, d] - high * sin[i, d]
                heads[i, h, half + d] = high * cos[i, half + d] + low * sin[i, half + d]
            for d in range(2 * half, size):
                heads[i, h, d] = products[i, first + d]


@compiled
def turn(products, starts, norms, eps, cos, sin, width, heads):
    """Write queries, keys and values [n, heads, d] from a product's columns, which begin at ``starts``.

    Each head of the first two is normalised if their one of ``norms`` has d, and turned: its first ``width`` columns,
    in pairs that are half of it apart, by ``cos`` and ``sin`` [n, >= width].
    """
    _turn(products, starts[0], norms[0], eps, cos, sin, width, heads[0])
    _turn(products, starts[1], norms[1], eps, cos, sin, width, heads[1])
    _turn(products, starts[2], norms[2], eps, cos, sin, 0, heads[2])
