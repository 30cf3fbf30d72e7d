"""The phases of a stage's work, compiled by numba: each is cut into units for a team, or done by who comes if small.

``box`` is the team's mailbox. What a row gets does not depend on whether, and how, a phase is cut.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.mailbox_kernel import (
    ADD,
    ATTEND,
    GATE,
    TAKE,
    TURN,
    WRITE,
    open_phase,
    put_float,
    put_number,
)
from flowspec.model.packed import BFLOAT16, GROUP
from flowspec.model.slot_kernel import END, FIRST, IS_HALF, NUM_KV_HEADS, SEEN, SEEN_END
from flowspec.model.team_code import put_arrays
from flowspec.model.team_kernel import share, share_of
from flowspec.model.tile_code import BLOCKS
from flowspec.model.vector_code import LANES

# What one core does in a nanosecond, roughly.
_BYTES, _PRODUCTS, _FLOAT_PRODUCTS, _SCORED = 20.0, 150.0, 40.0, 30.0
_TAKEN, _GATED, _ADDED, _TURNED, _WRITTEN = 1.5, 1.0, 5.0, 1.8, 1.6
_ROWS = 4  # of a request, that attend at least to their paths together


@compiled
def taken(box, rows, norm, eps, size, matrix):
    """Rows [n, K] as ``multiply`` reads them: codes, scales, sums.

    They are normalised before if ``norm`` has their width. ``size``: as of ``take``.
    """
    codes, scales, sums = _empty(len(rows), matrix)
    phase, count = open_phase(box, rows.size / _TAKEN, len(rows))
    put_arrays(phase, 0, (rows, norm, codes, scales, sums))
    put_float(phase, 0, eps)
    put_number(phase, 1, size)
    share(phase, box[TAKE], count)
    return codes, scales, sums


@compiled
def taken_gates(box, products, inner_size, up, is_gelu, size, matrix):
    """``gated`` rows, as ``taken``."""
    codes, scales, sums = _empty(len(products), matrix)
    phase, count = open_phase(box, len(products) * inner_size / _GATED, len(products))
    put_arrays(phase, 0, (products, codes, scales, sums))
    put_number(phase, 0, inner_size)
    put_number(phase, 1, up)
    put_number(phase, 2, 1 if is_gelu else 0)
    put_number(phase, 3, size)
    share(phase, box[GATE], count)
    return codes, scales, sums


@compiled
def _empty(num_rows, matrix):
    num_groups, width = matrix[0].shape[1], GROUP if matrix[5] < BFLOAT16 else 4 * GROUP
    codes = np.empty((num_rows, num_groups, width), np.int8)
    return codes, np.empty((num_rows, num_groups), np.float32), np.empty((num_rows, num_groups), np.int32)


@compiled
def product(box, rows, matrix):
    """Rounded rows times a matrix -> [n, blocks * LANES]."""
    codes, of_matrix = rows[0], matrix[0]
    num_rows, num_blocks = len(codes), len(of_matrix)
    products = np.empty((num_rows, num_blocks * LANES), np.float32)
    cost_ns = of_matrix.size / _BYTES + _products_ns(num_rows * num_blocks * LANES * codes.shape[1] * GROUP, matrix)
    phase, count = open_phase(box, cost_ns, num_blocks // BLOCKS)
    _put_product(phase, rows, matrix, products)
    share(phase, matrix[6], count)
    return products


@compiled
def product_by_expert(box, rows, starts, experts, matrices):
    """As ``product``, by the experts' ones: the rows ``[starts[j], starts[j + 1])`` with the ``experts[j]``-th one."""
    codes, of_matrices = rows[0], matrices[0]
    num_rows, num_blocks = len(codes), of_matrices.shape[1]
    products = np.empty((num_rows, num_blocks * LANES), np.float32)
    num_bytes = len(experts) * (of_matrices.size // len(of_matrices))
    cost_ns = num_bytes / _BYTES + _products_ns(num_rows * num_blocks * LANES * codes.shape[1] * GROUP, matrices)
    phase, count = open_phase(box, cost_ns, num_blocks // BLOCKS)
    _put_product(phase, rows, matrices, products)
    put_arrays(phase, 9, (starts, experts))
    share(phase, matrices[6], count)
    return products


@compiled
def _products_ns(count, matrix):
    return count / (_PRODUCTS if matrix[5] < BFLOAT16 else _FLOAT_PRODUCTS)


@compiled
def _put_product(box, rows, matrix, products):
    put_arrays(box, 0, rows)
    put_arrays(box, 3, (matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], products))


@compiled
def add_rows(box, products, weight, eps, multiplier, hidden):
    """As ``row_kernel.add``."""
    phase, count = open_phase(box, hidden.size / _ADDED, len(hidden))
    put_arrays(phase, 0, (products, weight, hidden))
    put_float(phase, 0, eps)
    put_float(phase, 1, multiplier)
    share(phase, box[ADD], count)


@compiled
def turn_rows(box, products, starts, norms, eps, cos, sin, width, heads):
    """As ``row_kernel.turn``."""
    phase, count = open_phase(box, products.size / _TURNED, len(products))
    put_arrays(phase, 0, (products, norms[0], norms[1], norms[2], cos, sin, heads[0], heads[1], heads[2]))
    for place in range(3):
        put_number(phase, place, starts[place])
    put_float(phase, 3, eps)
    put_number(phase, 4, width)
    share(phase, box[TURN], count)


@compiled
def write_and_attend(box, table, query, key, value, factor, attended):
    """Write the rows of a forward into their slots, and what they see there.

    ``table`` [requests, fields]: as ``slot_kernel`` describes a request; the rest: as of its functions.
    """
    _write(box, table, key, value)
    cost_ns = 0.0
    for r in range(len(table)):
        cost_ns += _cost(table[r], query)
    phase, count = open_phase(box, cost_ns, len(query) * query.shape[1])
    plan = np.empty((3 * (count + len(table)), 5), np.int64)
    num_units = 0
    for r in range(len(table)):
        num_units = _cut(table[r], r, max(1, round(count * _cost(table[r], query) / cost_ns)), plan, num_units)
    put_float(phase, 0, factor)
    _share_plan(phase, box[ATTEND], num_units, table, plan, query, attended)


@compiled
def _write(box, table, key, value):
    phase, count = open_phase(box, 2 * key.size / _WRITTEN, len(key))
    plan = np.empty((count + len(table), 5), np.int64)
    num_units = 0
    for r in range(len(table)):
        num_rows = table[r, END] - table[r, FIRST]
        parts = max(1, count * num_rows // len(key))
        for part in range(parts):
            plan[num_units, 0] = r
            plan[num_units, 1], plan[num_units, 2] = share_of(part, parts, num_rows)
            num_units += 1
    _share_plan(phase, box[WRITE], num_units, table, plan, key, value)


@compiled
def _share_plan(box, work, num_units, table, plan, given, found):
    """A function of its own: an array lives until a call that it is passed to returns, and else until its last use."""
    put_arrays(box, 0, (table, plan, given, found))
    share(box, work, num_units)


@compiled
def _cost(request, query):
    """Nanoseconds: keys and values are read, and multiplied with."""
    num_rows = request[END] - request[FIRST]
    num_values = 2.0 * (request[SEEN_END] - request[SEEN]) * query.shape[2]
    num_bytes = request[NUM_KV_HEADS] * (2 if request[IS_HALF] else 4)
    return num_values * (num_bytes / _BYTES + num_rows * query.shape[1] / _SCORED)


@compiled
def _cut(request, r, count, plan, num_units):
    """Add about ``count`` units of a request to a plan, by the heads of keys and by rows: how many it has then."""
    num_rows, num_heads = request[END] - request[FIRST], request[NUM_KV_HEADS]
    by_head = num_heads if 2 * count > num_heads else count
    by_row = min((count + by_head - 1) // by_head, (num_rows + _ROWS - 1) // _ROWS)
    for head in range(by_head):
        for row in range(by_row):
            plan[num_units, 0] = r
            plan[num_units, 1], plan[num_units, 2] = share_of(row, by_row, num_rows)
            plan[num_units, 3], plan[num_units, 4] = share_of(head, by_head, num_heads)
            num_units += 1
    return num_units
