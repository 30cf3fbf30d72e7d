"""Attention over the slots of one request, compiled by numba: each row's sums in the order of its own positions.

What a row sees is its path: the slots of the tokens before it and its own, by position. All sums over a path are made
in its order, so a row's bits depend on its tokens alone, and neither on the slots these have nor on the rows beside it.

Keys are kept transposed in blocks of slots, whose scores are computed side by side; a value is one line. Loops are
written for the compiler: an index is a loop's own variable and never a sum of two, nor is an array sliced; else it does
not see that the products of neighbours can be added in one instruction, which is four times as fast.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.tile_code import LANES, fused

BLOCK = 64  # slots of one block of keys; also how much of its path a row mixes before the next row's turn
UNROLL = 8  # products that are added to a sum before it is stored

_LOG2_E = 1.4426950408889634
_LN_2 = np.float32(0.6931471805599453)
_ONE, _HALF = np.float32(1), np.float32(0.5)
_LOWEST = np.float32(-126)  # the exponent of the smallest normal number, which is nothing beside a 1
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)


@compiled
def attend(query, key, value, slots, starts, path, num_shared, keys, values, scaling, attended):
    """Write the rows of one request into their slots; then let each attend to its path.

    ``query`` [n, heads, d], ``key`` and ``value`` [n, kv_heads, d], float32. ``slots`` [n]: theirs. Row i sees the
    slots ``path[starts[i]:starts[i + 1]]``, of which the first ``num_shared`` are the same for all rows. ``keys``
    [kv_heads, blocks, d / UNROLL, UNROLL, BLOCK], d filled up with zeros; ``values`` [kv_heads, blocks * BLOCK, d].
    ``attended`` [n, heads * d] is written.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = len(keys)
    group = num_heads // num_kv_heads
    num_lines = num_rows * group  # for each row, one of each head that reads the same keys
    longest = np.diff(starts).max()
    scores = np.empty((num_lines, path.max() // BLOCK + 1, BLOCK), np.float32)
    scores_by_slot = scores.reshape(num_lines, scores.shape[1] * BLOCK)
    weights = np.empty((num_lines, _parts(longest, BLOCK), BLOCK // UNROLL, UNROLL), np.float32)
    weights_by_place = weights.reshape(num_lines, weights.shape[1] * BLOCK)
    lines = np.zeros((num_lines, keys.shape[2], UNROLL), np.float32)
    lines_by_dim = lines.reshape(num_lines, keys.shape[2] * UNROLL)
    mixed = np.empty((num_lines, head_dim), np.float32)
    powers = np.empty(longest, np.float32)
    partial = np.empty(LANES, np.float32)
    _write(key, value, slots, keys, values)
    for kv_head in range(num_kv_heads):
        _read(query, kv_head, group, np.float32(scaling * _LOG2_E), lines_by_dim)
        for block in range(scores.shape[1]):
            for line in range(num_lines):
                _score(lines, line, keys, kv_head, block, scores)
        for line in range(num_lines):
            begin, count = starts[line // group], starts[line // group + 1] - starts[line // group]
            _weigh(scores_by_slot, line, path, begin, count, weights_by_place, powers, powers.view(np.int32))
        _mix(weights, starts, path, num_shared, values, kv_head, group, mixed)
        for i in range(num_rows):
            for h in range(group):
                total = _total(weights_by_place, i * group + h, starts[i + 1] - starts[i], partial)
                for d in range(head_dim):
                    attended[i, (kv_head * group + h) * head_dim + d] = mixed[i * group + h, d] / total


@compiled
def _parts(count, size):
    return (count + size - 1) // size


@compiled
def _write(key, value, slots, keys, values):
    num_rows, num_kv_heads, head_dim = key.shape
    for i in range(num_rows):
        block, lane = slots[i] // BLOCK, slots[i] % BLOCK
        for kv_head in range(num_kv_heads):
            for d in range(head_dim):
                keys[kv_head, block, d // UNROLL, d % UNROLL, lane] = key[i, kv_head, d]
                values[kv_head, slots[i], d] = value[i, kv_head, d]


@compiled
def _read(query, kv_head, group, factor, lines_by_dim):
    num_rows, _, head_dim = query.shape
    for i in range(num_rows):
        for h in range(group):
            for d in range(head_dim):
                lines_by_dim[i * group + h, d] = query[i, kv_head * group + h, d] * factor


@compiled
def _score(lines, line, keys, kv_head, block, scores):
    """The products of a line with all keys of a block."""
    for slot in range(BLOCK):
        scores[line, block, slot] = 0
    for part in range(lines.shape[1]):
        for slot in range(BLOCK):
            score = scores[line, block, slot]
            for u in range(UNROLL):
                score = fused(lines[line, part, u], keys[kv_head, block, part, u, slot], score)
            scores[line, block, slot] = score


@compiled
def _weigh(scores_by_slot, line, path, begin, count, weights, powers, exponents):
    """The powers of 2 of a line's scores along its path, beside that of the highest; ``exponents``: powers' bits.

    2 ** x is 2 ** (its nearest whole number) by the bits of a float, times that of the rest by its Taylor series.
    """
    for j in range(count):
        weights[line, j] = scores_by_slot[line, path[begin + j]]
    highest = weights[line, 0]
    for j in range(count):
        highest = max(highest, weights[line, j])
    for j in range(count):
        power = max(weights[line, j] - highest, _LOWEST)
        whole = np.floor(power + _HALF)
        rest = (power - whole) * _LN_2
        series = fused(rest, np.float32(1 / 5040), np.float32(1 / 720))
        series = fused(series, rest, np.float32(1 / 120))
        series = fused(series, rest, np.float32(1 / 24))
        series = fused(series, rest, np.float32(1 / 6))
        series = fused(series, rest, _HALF)
        series = fused(series, rest, _ONE)
        weights[line, j] = fused(series, rest, _ONE)
        exponents[j] = (np.int32(whole) + _BIAS) << _MANTISSA_BITS
    for j in range(count):
        weights[line, j] *= powers[j]
    for j in range(count, _parts(count, UNROLL) * UNROLL):
        weights[line, j] = 0


@compiled
def _total(weights, line, count, partial):
    partial[:] = 0
    full = count // LANES * LANES
    for j in range(0, full, LANES):
        for lane in range(LANES):
            partial[lane] += weights[line, j + lane]
    for j in range(full, count):
        partial[j - full] += weights[line, j]
    total = np.float32(0)
    for lane in range(LANES):
        total += partial[lane]
    return total


@compiled
def _mix(weights, starts, path, num_shared, values, kv_head, group, mixed):
    """The weighted sums of the values along the paths: a block of each path, then the next of each."""
    mixed[:] = 0
    copied = np.empty((BLOCK // UNROLL, UNROLL, mixed.shape[1]), np.float32)
    for block in range(weights.shape[1]):
        is_shared = (block + 1) * BLOCK <= num_shared
        for i in range(len(starts) - 1):
            begin = starts[i] + block * BLOCK
            count = min(starts[i + 1] - begin, BLOCK)
            if count > 0 and not (is_shared and i):
                _copy(values, kv_head, path, begin, count, copied)
            for line in range(i * group, (i + 1) * group):
                _add_products(weights, line, block, _parts(count, UNROLL), copied, mixed)


@compiled
def _copy(values, kv_head, path, begin, count, copied):
    """The values of ``count`` slots from ``begin`` on, and zeros behind them."""
    for j in range(count):
        slot = path[begin + j]
        for d in range(copied.shape[2]):
            copied[j // UNROLL, j % UNROLL, d] = values[kv_head, slot, d]
    for j in range(count, _parts(count, UNROLL) * UNROLL):
        copied[j // UNROLL, j % UNROLL, :] = 0


@compiled
def _add_products(weights, line, block, num_parts, copied, mixed):
    for part in range(num_parts):
        for d in range(mixed.shape[1]):
            total = mixed[line, d]
            for u in range(UNROLL):
                total = fused(weights[line, block, part, u], copied[part, u, d], total)
            mixed[line, d] = total
