"""Attention over the slots of one request, compiled by numba: each row's sums in the order of its own positions.

What a row sees is its path: the slots of the tokens before it and its own, by position. All sums over a path are made
in its order, so a row's bits depend on its tokens alone, and neither on the slots these have nor on the rows beside it.

Keys are kept transposed in blocks of slots, whose scores are computed side by side; a value is one line. Lines that
read the same keys and values are multiplied with these together.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.row_kernel import LOWEST, power_of_2
from flowspec.model.team_code import carray, pointer
from flowspec.model.vector_code import (
    LANES,
    four_by_four,
    four_by_one,
    highest_of,
    one_by_four,
    one_by_one,
    sum_of,
    two_by_four,
    two_by_one,
)

BLOCK = 64  # slots of one block of keys; also how much of its path a row mixes before the next row's turn

# What the attention of one request in one layer is described by: a row of whole numbers, some of which are addresses.
FIRST, END = 0, 1  # its rows, of those of a forward
SLOTS = 2  # of its rows, int64 [n]
STARTS, PATH, PATH_LEN = 3, 4, 5  # row i sees the slots path[starts[i]:starts[i + 1]], int64 and int32
NUM_SHARED = 6  # so many of the first ones are the same for all rows
NUM_SEEN = 7  # slots among which these are, in whole blocks
KEYS, VALUES = 8, 9  # float32 [kv_heads, blocks, d, BLOCK] and [kv_heads, blocks * BLOCK, d filled up to whole lanes]
NUM_BLOCKS, NUM_KV_HEADS = 10, 11
NUM_FIELDS = 12


@compiled
def _cache(request, head_dim):
    """Keys and values."""
    num_kv_heads, num_blocks = request[NUM_KV_HEADS], request[NUM_BLOCKS]
    keys = carray(pointer(request[KEYS]), (num_kv_heads, num_blocks, head_dim, BLOCK), np.float32)
    width = (head_dim + LANES - 1) // LANES * LANES
    return keys, carray(pointer(request[VALUES]), (num_kv_heads, num_blocks * BLOCK, width), np.float32)


@compiled
def write(request, begin, end, key, value):
    """Put the rows ``[begin, end)`` of a request into their slots.

    ``key`` and ``value`` [rows of the forward, kv_heads, d], float32.
    """
    first, num_kv_heads, head_dim = request[FIRST], key.shape[1], key.shape[2]
    keys, values = _cache(request, head_dim)
    slots = carray(pointer(request[SLOTS]), (request[END] - first,), np.int64)
    for i in range(begin, end):
        block, lane = slots[i] // BLOCK, slots[i] % BLOCK
        for kv_head in range(num_kv_heads):
            for d in range(head_dim):
                keys[kv_head, block, d, lane] = key[first + i, kv_head, d]
                values[kv_head, slots[i], d] = value[first + i, kv_head, d]


@compiled
def attend(request, begin, end, kv_begin, kv_end, all_queries, factor, all_attended):
    """Let the rows ``[begin, end)`` of a request attend to their paths, in the heads of some keys.

    ``all_queries`` [rows of the forward, heads, d], float32, whose scores are to be multiplied by ``factor`` to be
    powers of 2; ``all_attended`` [rows of the forward, heads * d] is written.
    """
    first = request[FIRST]
    query, attended = all_queries[first + begin : first + end], all_attended[first + begin : first + end]
    num_rows, num_heads, head_dim = query.shape
    keys, values = _cache(request, head_dim)
    path = carray(pointer(request[PATH]), (request[PATH_LEN],), np.int32)
    starts = carray(pointer(request[STARTS]), (request[END] - first + 1,), np.int64)[begin : end + 1]
    num_kv_heads, num_blocks = keys.shape[:2]
    group = num_heads // num_kv_heads
    num_lines = num_rows * group  # for each row, one of each head that reads the same keys
    longest = 0
    for i in range(num_rows):
        longest = max(longest, starts[i + 1] - starts[i])
    num_seen = request[NUM_SEEN]
    scores = np.empty((num_lines, num_seen), np.float32)
    weights = np.empty((num_lines, (longest + LANES - 1) // LANES * LANES), np.float32)
    lines = np.empty((num_lines, head_dim), np.float32)
    mixed = np.empty((num_lines, values.shape[2]), np.float32)
    for kv_head in range(kv_begin, kv_end):
        _read(query, kv_head, group, factor, lines)
        scores[:] = 0
        for block in range(num_seen // BLOCK):
            at = (kv_head * num_blocks + block) * head_dim * BLOCK
            _accumulate(lines, 0, num_lines, 0, keys, at, BLOCK, scores, block * BLOCK, BLOCK, head_dim)
        for line in range(num_lines):
            begin_of, count = starts[line // group], starts[line // group + 1] - starts[line // group]
            _weigh(scores, line, path, begin_of, count, weights)
        _mix(weights, starts, path, request[NUM_SHARED], values, kv_head, group, mixed)
        for i in range(num_rows):
            for h in range(group):
                line, count = i * group + h, (starts[i + 1] - starts[i] + LANES - 1) // LANES * LANES
                total = sum_of(weights, line * weights.shape[1], count)
                for d in range(head_dim):
                    attended[i, (kv_head * group + h) * head_dim + d] = mixed[line, d] / total


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
def _is_straight(path, begin, count):
    """Whether these slots lie side by side."""
    num_off = 0
    for j in range(count):
        num_off += path[begin + j] != path[begin] + j
    return num_off == 0


@compiled
def _weigh(scores, line, path, begin, count, weights):
    """The powers of 2 of a line's scores along its path, beside that of the highest, and zeros behind them."""
    for j in range(count):
        weights[line, j] = scores[line, path[begin + j]]
    full = (count + LANES - 1) // LANES * LANES
    for j in range(count, full):
        weights[line, j] = weights[line, 0]
    highest = highest_of(weights, line * weights.shape[1], full)
    for j in range(count):
        weights[line, j] = power_of_2(max(weights[line, j] - highest, LOWEST))
    for j in range(count, full):
        weights[line, j] = 0


@compiled
def _mix(weights, starts, path, num_shared, values, kv_head, group, mixed):
    """The weighted sums of the values along the paths: a block of each path, then the next of each."""
    mixed[:] = 0
    width = values.shape[2]
    copied = np.empty((BLOCK, width), np.float32)
    num_rows = len(starts) - 1
    for block in range((weights.shape[1] + BLOCK - 1) // BLOCK):
        is_shared = (block + 1) * BLOCK <= num_shared
        for i in range(1 if is_shared else num_rows):
            begin = starts[i] + block * BLOCK
            count = min(starts[i + 1] - begin, BLOCK)
            if count <= 0:
                continue
            first, last = (0, num_rows * group) if is_shared else (i * group, (i + 1) * group)
            if _is_straight(path, begin, count):
                at = (kv_head * values.shape[1] + path[begin]) * width
                _accumulate(weights, first, last, block * BLOCK, values, at, width, mixed, 0, width, count)
            else:
                _copy(values, kv_head, path, begin, count, copied)
                _accumulate(weights, first, last, block * BLOCK, copied, 0, width, mixed, 0, width, count)


@compiled
def _copy(values, kv_head, path, begin, count, copied):
    for j in range(count):
        slot = path[begin + j]
        for d in range(copied.shape[1]):
            copied[j, d] = values[kv_head, slot, d]
