"""Attention over the slots of one request, compiled by numba: each row's sums in the order of its own positions.

What a row sees is its path: the slots of the tokens before it and its own, by position. All sums over a path are made
in its order, so a row's bits depend on its tokens alone, and neither on the slots these have nor on the rows beside it.

Keys are kept transposed in blocks of slots, whose scores are computed side by side; a value is one line. Lines that
read the same keys and values are multiplied with these together. What is kept in float16 is made float32 block by
block, near the processor, before it is multiplied with.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.row_kernel import LOG2_E, LOWEST, power_of_2
from flowspec.model.team_code import array_at
from flowspec.model.vector_code import (
    LANES,
    as_bits,
    four_by_four,
    four_by_one,
    highest_of,
    one_by_four,
    one_by_one,
    sum_of,
    two_by_four,
    two_by_one,
    widen,
)

BLOCK = 64  # slots of one block of keys; also how much of its path a row mixes before the next row's turn

# What the attention of one request in one layer is described by: a row of whole numbers, some of which are addresses.
FIRST, END = 0, 1  # its rows, of those of a forward
SLOTS = 2  # of its rows, int64 [n]
STARTS, PATH, PATH_LEN = 3, 4, 5  # row i sees the slots path[starts[i]:starts[i + 1]], int64 and int32
NUM_SHARED = 6  # so many of the first ones are the same for all rows
SEEN, SEEN_END = 7, 8  # slots among which these are, in whole blocks
KEYS, VALUES = 9, 10  # [kv_heads, blocks, d, BLOCK] and [kv_heads, blocks * BLOCK, d filled up to whole lanes]
NUM_BLOCKS, NUM_KV_HEADS = 11, 12
IS_HALF = 13  # whether keys and values are float16, instead of float32
NUM_FIELDS = 14

_HIGHEST_HALF, _LOWEST_NORMAL, _HALF = np.float32(65504), np.float32(2**-14), np.float32(0.5)
_NO_NUMBER = np.int32(0x7E00)


@compiled
def _cache(request, head_dim, dtype):
    """Keys and values."""
    num_kv_heads, num_blocks = request[NUM_KV_HEADS], request[NUM_BLOCKS]
    keys = array_at(request[KEYS], (num_kv_heads, num_blocks, head_dim, BLOCK), dtype)
    width = (head_dim + LANES - 1) // LANES * LANES
    return keys, array_at(request[VALUES], (num_kv_heads, num_blocks * BLOCK, width), dtype)


@compiled
def write(request, begin, end, key, value):
    """Put the rows ``[begin, end)`` of a request into their slots.

    ``key`` and ``value`` [rows of the forward, kv_heads, d], float32.
    """
    first, num_kv_heads, head_dim = request[FIRST], key.shape[1], key.shape[2]
    keys, values = _cache(request, head_dim, np.float32)
    half_keys, half_values = _cache(request, head_dim, np.uint16)
    slots = array_at(request[SLOTS], (request[END] - first,), np.int64)
    for i in range(begin, end):
        slot, block, lane = slots[i], slots[i] // BLOCK, slots[i] % BLOCK
        for kv_head in range(num_kv_heads):
            if request[IS_HALF]:
                for d in range(head_dim):
                    half_keys[kv_head, block, d, lane] = half_of(key[first + i, kv_head, d])
                for d in range(head_dim):
                    half_values[kv_head, slot, d] = half_of(value[first + i, kv_head, d])
            else:
                for d in range(head_dim):
                    keys[kv_head, block, d, lane] = key[first + i, kv_head, d]
                    values[kv_head, slot, d] = value[first + i, kv_head, d]


@compiled
def half_of(x):
    """The bits of the float16 that is nearest to a float32, of two the even one; the highest one for what is above."""
    size = abs(x)
    if size > _HIGHEST_HALF:
        size = _HIGHEST_HALF
    bits = as_bits(size)
    if size < _LOWEST_NORMAL:  # whose steps are as those of numbers from a half on are in float32
        code = as_bits(size + _HALF) - as_bits(_HALF)
    else:
        code = (bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1)) - np.int32(112 << 23)) >> np.int32(13)
    if size != size:
        code = _NO_NUMBER
    return np.uint16(code | ((as_bits(x) >> np.int32(16)) & np.int32(0x8000)))


def factor_of(scaling: float) -> np.float32:
    """By which ``attend`` multiplies scores that are scaled so, to be powers of 2 instead of e."""
    return np.float32(scaling * LOG2_E)


@compiled
def attend(request, begin, end, kv_begin, kv_end, all_queries, factor, all_attended):
    """Let the rows ``[begin, end)`` of a request attend to their paths, in the heads of some keys.

    ``all_queries`` [rows of the forward, heads, d], float32, whose scores are to be multiplied by ``factor`` to be
    powers of 2; ``all_attended`` [rows of the forward, heads * d] is written.
    """
    first = request[FIRST]
    query, attended = all_queries[first + begin : first + end], all_attended[first + begin : first + end]
    num_rows, num_heads, head_dim = query.shape
    path = array_at(request[PATH], (request[PATH_LEN],), np.int32)
    starts = array_at(request[STARTS], (request[END] - first + 1,), np.int64)[begin : end + 1]
    group = num_heads // request[NUM_KV_HEADS]
    num_lines = num_rows * group  # for each row, one of each head that reads the same keys
    width, longest = (head_dim + LANES - 1) // LANES * LANES, 0
    for i in range(num_rows):
        longest = max(longest, starts[i + 1] - starts[i])
    straight = _straight_blocks(path, starts, longest)
    scores = np.empty((num_lines, request[SEEN_END] - request[SEEN]), np.float32)
    weights = np.empty((num_lines, (longest + LANES - 1) // LANES * LANES), np.float32)
    lines = np.empty((num_lines, head_dim), np.float32)
    near, mixed = np.empty((BLOCK, width), np.float32), np.empty((num_lines, width), np.float32)
    for kv_head in range(kv_begin, kv_end):
        _read(query, kv_head, group, factor, lines)
        _score(request, kv_head, lines, near, scores)
        for line in range(num_lines):
            i = line // group
            _weigh(scores, line, request[SEEN], path[starts[i] : starts[i + 1]], straight[i], weights)
        _mix(request, kv_head, weights, starts, path, straight, group, near, mixed)
        for i in range(num_rows):
            for h in range(group):
                line, count = i * group + h, (starts[i + 1] - starts[i] + LANES - 1) // LANES * LANES
                total = sum_of(weights, line * weights.shape[1], count)
                for d in range(head_dim):
                    attended[i, (kv_head * group + h) * head_dim + d] = mixed[line, d] / total


@compiled
def _straight_blocks(path, starts, longest):
    """For each row and each block of its path, whether its slots lie side by side."""
    straight = np.zeros((len(starts) - 1, (longest + BLOCK - 1) // BLOCK), np.bool_)
    for i in range(len(straight)):
        for block in range(straight.shape[1]):
            begin, num_off = starts[i] + block * BLOCK, 0
            for j in range(min(starts[i + 1] - begin, BLOCK)):
                num_off += path[begin + j] != path[begin] + j
            straight[i, block] = num_off == 0
    return straight


@compiled
def _read(query, kv_head, group, factor, lines):
    num_rows, _, head_dim = query.shape
    for i in range(num_rows):
        for h in range(group):
            for d in range(head_dim):
                lines[i * group + h, d] = query[i, kv_head * group + h, d] * factor


@compiled
def _accumulate(factors, first, last, column, rows, at, apart, sums, at_sums, width, count):
    """sums[line, at_sums:] += factors[line, column + k] * rows[k], k by k, for the lines ``[first, last)``.

    ``rows`` [count, width] begin at ``at`` in their memory, and lie ``apart``; their width is one of whole lanes.
    """
    of_factors, of_sums = factors.shape[1], sums.shape[1]
    line = first
    while line < last:
        own, sum_at, lane = line * of_factors + column, line * of_sums + at_sums, 0
        step = 4 if last - line >= 4 else 2 if last - line >= 2 else 1
        while lane < width:
            given, found = at + lane, sum_at + lane
            if width - lane >= 4 * LANES:
                if step == 4:
                    four_by_four(factors, own, of_factors, rows, given, apart, sums, found, of_sums, count)
                elif step == 2:
                    two_by_four(factors, own, of_factors, rows, given, apart, sums, found, of_sums, count)
                else:
                    one_by_four(factors, own, of_factors, rows, given, apart, sums, found, of_sums, count)
                lane += 4 * LANES
            else:
                if step == 4:
                    four_by_one(factors, own, of_factors, rows, given, apart, sums, found, of_sums, count)
                elif step == 2:
                    two_by_one(factors, own, of_factors, rows, given, apart, sums, found, of_sums, count)
                else:
                    one_by_one(factors, own, of_factors, rows, given, apart, sums, found, of_sums, count)
                lane += LANES
        line += step


@compiled
def _score(request, kv_head, lines, near, scores):
    """What lines are multiplied with the keys of all slots that are seen."""
    head_dim, begin = lines.shape[1], request[SEEN] // BLOCK
    keys, _ = _cache(request, head_dim, np.float32)
    half_keys, _ = _cache(request, head_dim, np.uint16)
    scores[:] = 0
    for block in range(scores.shape[1] // BLOCK):
        at, column = (kv_head * request[NUM_BLOCKS] + begin + block) * head_dim * BLOCK, block * BLOCK
        if request[IS_HALF]:
            widen(half_keys, at, near, 0, head_dim * BLOCK)
            _accumulate(lines, 0, len(lines), 0, near, 0, BLOCK, scores, column, BLOCK, head_dim)
        else:
            _accumulate(lines, 0, len(lines), 0, keys, at, BLOCK, scores, column, BLOCK, head_dim)


@compiled
def _weigh(scores, line, first, path, straight, weights):
    """The powers of 2 of a line's scores along its path, beside that of the highest, and zeros behind them.

    ``first``: the slot that scores begin with.
    """
    count = len(path)
    for block in range((count + BLOCK - 1) // BLOCK):
        begin = block * BLOCK
        if straight[block]:
            place = path[begin] - first
            for j in range(min(count - begin, BLOCK)):
                weights[line, begin + j] = scores[line, place + j]
        else:
            for j in range(begin, min(count, begin + BLOCK)):
                weights[line, j] = scores[line, path[j] - first]
    full = (count + LANES - 1) // LANES * LANES
    for j in range(count, full):
        weights[line, j] = weights[line, 0]
    highest = highest_of(weights, line * weights.shape[1], full)
    for j in range(count):
        weights[line, j] = power_of_2(max(weights[line, j] - highest, LOWEST))
    for j in range(count, full):
        weights[line, j] = 0


@compiled
def _mix(request, kv_head, weights, starts, path, straight, group, near, mixed):
    """The weighted sums of the values along the paths: a block of each path, then the next of each."""
    mixed[:] = 0
    num_rows, width = len(starts) - 1, mixed.shape[1]
    _, values = _cache(request, width, np.float32)
    for block in range(straight.shape[1]):
        is_shared = (block + 1) * BLOCK <= request[NUM_SHARED]
        for i in range(1 if is_shared else num_rows):
            begin = starts[i] + block * BLOCK
            count = min(starts[i + 1] - begin, BLOCK)
            if count <= 0:
                continue
            first, last = (0, num_rows * group) if is_shared else (i * group, (i + 1) * group)
            if straight[i, block] and not request[IS_HALF]:
                at = (kv_head * values.shape[1] + path[begin]) * width
                _accumulate(weights, first, last, block * BLOCK, values, at, width, mixed, 0, width, count)
            else:
                _bring(request, kv_head, path[begin : begin + count], near)
                _accumulate(weights, first, last, block * BLOCK, near, 0, width, mixed, 0, width, count)


@compiled
def _bring(request, kv_head, slots, near):
    """Some slots' values."""
    width = near.shape[1]
    _, values = _cache(request, width, np.float32)
    _, half_values = _cache(request, width, np.uint16)
    for j in range(len(slots)):
        if request[IS_HALF]:
            widen(half_values, (kv_head * values.shape[1] + slots[j]) * width, near, j * width, width)
        else:
            for d in range(width):
                near[j, d] = values[kv_head, slots[j], d]
