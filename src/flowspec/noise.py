"""The Gumbel noise of a request's draws: for every (seed, position, token id) one number, made only where it matters.

The uniform bits of a position are a stream of Philox (Salmon et al. 2011) in the order of the token ids. The bits of a
vocabulary are cheap and the two logarithms behind each are not, so they are taken of the ids that are asked for alone.
It knows nothing of logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SLACK = 1e-12  # of a uniform number: far more than the logarithms' rounding


@dataclass
class _Stream:
    """One position's bits as far as they were asked for, and where more come from."""

    generator: np.random.Philox
    bits: NDArray[np.uint64]


class Noise:
    """Standard Gumbel noise of one request, by position and token id; bits are kept until a position is forgotten."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._streams: dict[int, _Stream] = {}

    def of(self, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """The noise [k] of some tokens, ``token_ids`` [k], at a position."""
        return gumbel(self._bits(position, int(token_ids.max(initial=-1)) + 1)[token_ids])

    def is_above(self, position: int, level: float, size: int) -> NDArray[np.bool_]:
        """Whose noise is at least ``level``, [size] by token id; maybe true for noise just below it as well."""
        # P(noise < level) = exp(-exp(-level)), and more noise is more bits.
        uniform = math.exp(-math.exp(-max(level, -8.0))) - _SLACK
        least_bits = np.uint64(int(max(uniform, 0.0) * 2.0**53) << 11)
        return self._bits(position, size)[:size] >= least_bits

    def forget(self, position: int) -> None:
        """This position and all before it are drawn."""
        self._streams = {at: stream for at, stream in self._streams.items() if at > position}

    def _bits(self, position: int, size: int) -> NDArray[np.uint64]:
        """At least ``size`` of them."""
        if position not in self._streams:
            # The position fills the counter's second word: the blocks of two positions never overlap.
            generator = np.random.Philox(key=self._seed, counter=position << 64)
            self._streams[position] = _Stream(generator, np.zeros(0, dtype=np.uint64))
        stream = self._streams[position]
        if (missing := size - len(stream.bits)) > 0:
            more = stream.generator.random_raw(missing)
            stream.bits = np.concatenate([stream.bits, more]) if len(stream.bits) else more
        return stream.bits


def gumbel(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard Gumbel noise from 64 uniform bits each, between -3.7 and 36.8."""
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    # The largest is rounded to 1, whose noise would be infinite.
    return -np.log(-np.log(np.minimum(uniform, 1 - 2.0**-53)))
