"""Which experts of a mixture a row goes to, and what it gets of each, in float32, compiled by numba.

Loops are written for the compiler, as in ``slot_kernel``: outputs are cut into blocks of lanes, inputs into parts.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.row_kernel import exp
from flowspec.model.vector_code import fused

LANES = 64  # outputs of one block
PART = 8  # inputs whose products are added to a sum before it is stored
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def route(rows, router, num_experts, is_normed, chosen, shares):
    """The experts of each row, best first, and what of each it gets.

    ``rows`` [n, parts, PART]; ``router`` [blocks, parts, PART, LANES], float32. ``chosen`` and ``shares`` [n, k] are
    written. ``is_normed``: a row's shares add up to 1.
    """
    logits = np.empty((len(router), LANES), np.float32)
    scores = np.empty(num_experts, np.float32)
    for i in range(len(rows)):
        for block in range(len(router)):
            _multiply(rows, i, router, block, logits)
        highest = logits[0, 0]
        for expert in range(num_experts):
            scores[expert] = logits[expert // LANES, expert % LANES]
            highest = max(highest, scores[expert])
        total = _ZERO
        for expert in range(num_experts):
            scores[expert] = exp(scores[expert] - highest)
            total += scores[expert]
        of_chosen = _ZERO
        for place in range(chosen.shape[1]):
            best = 0
            for expert in range(num_experts):
                if scores[expert] > scores[best]:
                    best = expert
            chosen[i, place] = best
            shares[i, place] = scores[best] / total
            of_chosen += shares[i, place]
            scores[best] = -_ONE
        if is_normed:
            for place in range(chosen.shape[1]):
                shares[i, place] /= of_chosen


@compiled
def _multiply(rows, row, weights, block, sums):
    """The products of a row with a block of the router."""
    for lane in range(LANES):
        sums[block, lane] = 0
    for part in range(rows.shape[1]):
        for lane in range(LANES):
            total = sums[block, lane]
            for u in range(PART):
                total = fused(rows[row, part, u], weights[block, part, u, lane], total)
            sums[block, lane] = total


@compiled
def parts_of(rows, count):
    """Rows [n, K] as ``route`` reads them, filled up with zeros."""
    found = np.zeros((len(rows), count, PART), np.float32)
    for i in range(len(rows)):
        for j in range(rows.shape[1]):
            found[i, j // PART, j % PART] = rows[i, j]
    return found


@compiled
def by_expert(chosen, num_experts):
    """Pairs of a row and an expert, by expert: their ``order``, the experts, and where the pairs of each start.

    ``chosen`` [n, k]; pair p is of row ``p // k``. Behind the last start stands the number of pairs.
    """
    num_kept = chosen.shape[1]
    num_pairs = len(chosen) * num_kept
    counts, places = np.zeros(num_experts, np.int64), np.empty(num_experts, np.int64)
    for pair in range(num_pairs):
        counts[chosen[pair // num_kept, pair % num_kept]] += 1
    most = min(num_pairs, num_experts)
    experts, starts = np.empty(most, np.int64), np.empty(most + 1, np.int64)
    num_used = first = 0
    for expert in range(num_experts):
        places[expert] = first
        if counts[expert]:
            experts[num_used], starts[num_used] = expert, first
            num_used += 1
            first += counts[expert]
    starts[num_used] = first
    order = np.empty(num_pairs, np.int64)
    for pair in range(num_pairs):
        expert = chosen[pair // num_kept, pair % num_kept]
        order[places[expert]] = pair
        places[expert] += 1
    return order, starts[: num_used + 1], experts[:num_used]


@compiled
def of_pairs(rows, order, num_kept):
    """Rows as ``multiply`` reads them: the one of each pair."""
    codes, scales, sums = rows
    num_pairs, (_, num_groups, width) = len(order), codes.shape
    own_codes = np.empty((num_pairs, num_groups, width), np.int8)
    own_scales, own_sums = np.empty((num_pairs, num_groups), np.float32), np.empty((num_pairs, num_groups), np.int32)
    for place in range(num_pairs):
        row = order[place] // num_kept
        for group in range(num_groups):
            own_scales[place, group], own_sums[place, group] = scales[row, group], sums[row, group]
            for u in range(width):
                own_codes[place, group, u] = codes[row, group, u]
    return own_codes, own_scales, own_sums


@compiled
def share_out(given, order, shares, rows):
    """Add to each row its shares of what its experts gave, in the order of their numbers.

    ``given`` [pairs, >= H]: of the pair ``order[p]``, which is of row ``order[p] // k``. ``shares`` [n, k]; ``rows``
    [n, >= H] is written.
    """
    num_kept = shares.shape[1]
    for place in range(len(order)):
        row, kept = order[place] // num_kept, order[place] % num_kept
        for j in range(rows.shape[1]):
            rows[row, j] += shares[row, kept] * given[place, j]
