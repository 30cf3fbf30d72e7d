"""Which tokens temperature, min-p, top-k and top-p leave of a large vocabulary, without sorting it.

Only what may be left is ordered; the rest of a vocabulary is compared with a bound, or summed up. What comes out is
what sorting everything would give.
"""

from __future__ import annotations

import math
import sys
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flowspec.core import SamplingParams

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.floating[Any]]

FEW = 512  # of the most probable tokens: they nearly always hold the nucleus
NEVER = -1e4  # log-probability of what cannot be drawn: no noise makes up for it
_GROUP = 32  # values of which ``largest`` looks at the maximum first


def kept_ids(logits: Floats, params: SamplingParams) -> Ids | None:
    """The tokens that min-p, top-k and top-p leave, ascending; ``None`` for all of them.

    ``logits`` [V], finite, penalised already; ``params.temperature`` must be positive.
    """
    ids: Ids | None = None
    if 0 < params.top_k < len(logits):
        ids = largest(logits, params.top_k)
        ids = ids[logits[ids] >= np.partition(logits[ids], -params.top_k)[-params.top_k]]
    if params.min_p > 0 or params.top_p < 1:
        gaps = gaps_below(float(logits.max()), logits if ids is None else logits[ids], params.temperature)
        if params.min_p > 0:
            kept = np.flatnonzero(gaps >= math.log(params.min_p))
            ids, gaps = kept if ids is None else ids[kept], gaps[kept]
        if params.top_p < 1:
            kept = _nucleus(gaps, params.top_p)
            ids = kept if ids is None else ids[kept]
    return ids


def _nucleus(gaps: NDArray[np.float64], top_p: float) -> Ids:
    """Top-p (Holtzman et al., arXiv 1904.09751): the fewest most probable tokens that hold ``top_p``, ascending.

    Of equally probable tokens those with the smaller ids are kept.
    """
    weights = np.exp(gaps)
    mass = top_p * weights.sum()
    for size in (FEW, 16 * FEW, len(weights)):
        likely = largest(weights, size)
        descending = np.sort(weights[likely])[::-1]
        # The same sums as those of all the weights in order: whatever is left out would come later.
        num = int((descending.cumsum() < mass).sum()) + 1
        if num <= len(likely):
            edge = descending[num - 1]
            above, ties = likely[weights[likely] > edge], likely[weights[likely] == edge]
            return np.sort(np.concatenate([above, ties[: num - len(above)]]))
    return np.arange(len(weights))  # rounding may leave all of them just below the mass


def largest(values: Floats, num: int) -> Ids:
    """The ids of the ``num`` largest of ``values`` [V], all that tie with one of them, and maybe a few more; ascending.

    Whatever is left out is smaller than all that is not.
    """
    if num >= len(values):
        return np.arange(len(values))
    # The ``num``-th largest of the maxima of disjoint groups has ``num`` values at or above it.
    num_groups = len(values) // _GROUP
    groups = np.reshape(values[: num_groups * _GROUP], (_GROUP, num_groups))
    maxima = groups.max(axis=0) if num_groups >= num else values
    return np.flatnonzero(values >= np.partition(maxima, -num)[-num])


def best(values: Floats, num: int) -> Ids:
    """The ids of the ``num`` largest of ``values`` [V], best first; ties go to the smaller id."""
    likely = largest(values, num)
    return likely[np.argsort(-values[likely], kind="stable")[:num]]


def gaps_below(top: float, logits: Floats, temperature: float) -> NDArray[np.float64]:
    """How far log-probabilities [k] are, at a temperature, below that of the highest logit ``top``; ``NEVER`` at least.

    The difference is taken before the division, so that no temperature overflows.
    """
    with np.errstate(over="ignore"):
        gaps = np.subtract(logits, top, dtype=np.float64)
        gaps /= max(temperature, sys.float_info.min)
    return np.maximum(gaps, NEVER, out=gaps)
