"""A mixture of experts on packed weights, compiled by numba: each row's sums in an order of its own.

Weights lie so that one instruction multiplies an input with many outputs' codes: outputs are cut into blocks of lanes,
inputs into parts. A row is computed by itself, whatever rows need the same expert; these follow one another while a
block's weights are near. Loops are written for the compiler, as in ``slot_kernel``.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.slot_kernel import compiled

LANES = 64  # outputs of one block
PART = 8  # inputs whose products are added to a sum before it is stored
HALF = PART // 2  # inputs of a part that lie in the low halves of bytes, with 4 bits
_ZERO, _ONE = np.float32(0), np.float32(1)
# Of 32 bits, since numba's own whole numbers have 64, which takes twice as long.
_LOW, _BITS = np.int32(15), np.int32(4)


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
            scores[expert] = np.exp(scores[expert] - highest)
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
                total += rows[row, part, u] * weights[block, part, u, lane]
            sums[block, lane] = total


@compiled
def gate(rows, row_sums, order, starts, experts, first, step, of_gate, of_up, inner):
    """What goes into the experts' last matrices, silu(gate) * up, of the blocks ``first``, ``first + step``, ...

    ``rows`` [n, groups, parts, PART], and the sums of their groups [n, groups]. ``experts``: that some row needs; the
    j-th is needed by the pairs ``order[starts[j]:starts[j + 1]]``, of which pair p is of row p // k. ``of_gate`` and
    ``of_up``: codes, scales and zero points, as in ``packed_experts``. ``inner`` [pairs, I] is written.
    """
    num_kept = len(order) // len(rows)
    gated, up, of_group = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for j in range(len(experts)):
        for block in range(first, of_gate[0].shape[1], step):
            for place in range(starts[j], starts[j + 1]):
                pair = order[place]
                row = pair // num_kept
                _dot(rows, row_sums, row, of_gate, experts[j], block, of_group, gated)
                _dot(rows, row_sums, row, of_up, experts[j], block, of_group, up)
                for lane in range(min(LANES, inner.shape[1] - block * LANES)):
                    inner[pair, block * LANES + lane] = gated[lane] / (_ONE + np.exp(-gated[lane])) * up[lane]


@compiled
def down(inner, inner_sums, shares, order, starts, experts, first, step, of_down, hidden):
    """Add to each row of ``hidden`` [n, H] its shares of what its experts give, in the order of their numbers.

    ``inner`` [pairs, groups, parts, PART]; ``shares`` [pairs]. All else as of ``gate``.
    """
    num_kept = len(order) // len(hidden)
    given, of_group = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for j in range(len(experts)):
        for block in range(first, of_down[0].shape[1], step):
            for place in range(starts[j], starts[j + 1]):
                pair = order[place]
                _dot(inner, inner_sums, pair, of_down, experts[j], block, of_group, given)
                for lane in range(min(LANES, hidden.shape[1] - block * LANES)):
                    hidden[pair // num_kept, block * LANES + lane] += shares[pair] * given[lane]


@compiled
def sum_groups(rows, sums):
    """[n, groups, parts, PART] -> [n, groups]."""
    for i in range(rows.shape[0]):
        for group in range(rows.shape[1]):
            total = _ZERO
            for part in range(rows.shape[2]):
                for u in range(PART):
                    total += rows[i, group, part, u]
            sums[i, group] = total


@compiled
def _dot(rows, row_sums, row, weights, expert, block, of_group, sums):
    """The products of a row with a block of an expert's outputs."""
    codes, scales, zeros = weights
    for lane in range(LANES):
        sums[lane] = 0
    for group in range(rows.shape[1]):
        for lane in range(LANES):
            of_group[lane] = 0
        if len(zeros):
            _add_4(rows, row, codes, expert, block, group, of_group)
            for lane in range(LANES):
                of_group[lane] -= np.float32(zeros[expert, block, group, lane]) * row_sums[row, group]
        else:
            _add_8(rows, row, codes, expert, block, group, of_group)
        for lane in range(LANES):
            sums[lane] += of_group[lane] * scales[expert, block, group, lane]


@compiled
def _add_8(rows, row, codes, expert, block, group, of_group):
    for part in range(rows.shape[2]):
        for lane in range(LANES):
            total = of_group[lane]
            for u in range(PART):
                total += rows[row, group, part, u] * np.float32(codes[expert, block, group, part, u, lane])
            of_group[lane] = total


@compiled
def _add_4(rows, row, codes, expert, block, group, of_group):
    for part in range(rows.shape[2]):
        for lane in range(LANES):
            total = of_group[lane]
            for u in range(HALF):
                pair = np.int32(codes[expert, block, group, part, u, lane])
                total += rows[row, group, part, u] * np.float32(np.int32(pair & _LOW))
                total += rows[row, group, part, u + HALF] * np.float32(np.int32(pair >> _BITS))
            of_group[lane] = total
