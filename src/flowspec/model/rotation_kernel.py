"""By how much the heads of a row turn, which its position says, compiled by numba: the same bits on every processor.

A system's own cosines differ in their last bit from another one's. These are computed in float64, and are those of the
angle as nearly as float32 has them.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled

_QUARTERS = 0.6366197723675814  # of a turn, in one radian
# A quarter of a turn in two parts; the first has so few bits that a million times it is a float64.
_QUARTER, _REST = 1.5707963267341256, 6.077100506506192e-11


@compiled
def _cosine(square):
    """Of an angle up to an eighth of a turn, whose square is given: its Taylor series."""
    series = 1.0
    for n in range(16, 0, -2):
        series = 1.0 - series * square / (n * (n - 1))
    return series


@compiled
def _sine(angle, square):
    series = 1.0
    for n in range(17, 1, -2):
        series = 1.0 - series * square / (n * (n - 1))
    return series * angle


@compiled
def rotations(positions, frequencies, factor):
    """Cosines and sines [n, 2r] of the ``positions`` [n] times the ``frequencies`` [r], times ``factor``; float32.

    Each stands in both halves of a line. Positions are below a million.
    """
    half = len(frequencies)
    cos, sin = np.empty((len(positions), 2 * half), np.float32), np.empty((len(positions), 2 * half), np.float32)
    for i in range(len(positions)):
        for j in range(half):
            angle = np.float64(np.float32(positions[i]) * frequencies[j])
            quarters = np.floor(angle * _QUARTERS + 0.5)
            rest = angle - quarters * _QUARTER - quarters * _REST
            x, y = _cosine(rest * rest), _sine(rest, rest * rest)
            turned = np.int64(quarters) & 3
            if turned & 1:
                x, y = -y, x
            if turned & 2:
                x, y = -x, -y
            cos[i, j], sin[i, j] = np.float32(x) * factor, np.float32(y) * factor
            cos[i, half + j], sin[i, half + j] = cos[i, j], sin[i, j]
    return cos, sin
