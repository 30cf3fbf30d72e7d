"""The layers of a stage, compiled by numba: many in one call, since one from Python takes as long as a small product.

A layer is described by the words of a ``LayerRecord``, int64: numbers, the bits of float32, and where its arrays are,
as a mailbox tells of them.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled, inlined
from flowspec.model.expert_kernel import by_expert, of_pairs, parts_of, route, share_out
from flowspec.model.row_kernel import normalised
from flowspec.model.shared_kernel import (
    add_rows,
    product,
    product_by_expert,
    taken,
    taken_gates,
    turn_rows,
    write_and_attend,
)
from flowspec.model.team_code import ARRAYS, WORDS_EACH, array_1, array_2, array_3, array_4
from flowspec.model.vector_code import as_float

# Numbers of a record: flags, and what the kernels that are called have as arguments.
EPS, MULTIPLIER, FACTOR, IS_TURNED, ROTATION, IS_GELU, UP, NUM_INNER = range(8)
STARTS = 8  # of queries, keys and values in a row's products
NUM_EXPERTS, NUM_KEPT, IS_NORMED = range(11, 14)
MATRICES = 16  # of each: inputs that share a scale, its kind, and the address of what multiplies with it
NUMBERS_EACH = 3
# Arrays of a record: five of each matrix, then what norms multiply by, and a router.
HEADS, OUTPUT, GATE_UP, DOWN = range(4)
ARRAYS_EACH = 5
NORMS = 20
BEFORE, ATTENDED, INNER, GIVEN, OF_QUERIES, OF_KEYS, ROUTER = range(NORMS, 27)
NUM_FIELDS = ARRAYS + 27 * WORDS_EACH


@inlined
def _matrix(record, which):
    """As ``compiled_matrix.Lanes``."""
    array, number = which * ARRAYS_EACH, MATRICES + which * NUMBERS_EACH
    codes, scales = array_3(record, array, np.uint8), array_3(record, array + 1, np.uint16)
    zeros, offsets = array_3(record, array + 2, np.uint8), array_3(record, array + 3, np.uint16)
    return codes, scales, zeros, offsets, array_2(record, array + 4, np.float32), record[number + 1], record[number + 2]


@inlined
def _matrices(record, which):
    """As ``Lanes`` of all experts, and of the first."""
    array, number = which * ARRAYS_EACH, MATRICES + which * NUMBERS_EACH
    codes, scales = array_4(record, array, np.uint8), array_4(record, array + 1, np.uint16)
    zeros, offsets = array_4(record, array + 2, np.uint8), array_4(record, array + 3, np.uint16)
    biases, kind, multiplier = array_3(record, array + 4, np.float32), record[number + 1], record[number + 2]
    first = codes[0], scales[0], zeros[0], offsets[0], biases[0], kind, multiplier
    return (codes, scales, zeros, offsets, biases, kind, multiplier), first


@inlined
def _size(record, which):
    """As of ``take``: of the rows that a matrix is multiplied with."""
    return record[MATRICES + which * NUMBERS_EACH]


@inlined
def _norm(record, which):
    return array_1(record, which, np.float32)


@inlined
def _float(record, which):
    return as_float(np.int32(record[which]))


@inlined
def _write_heads(box, record, hidden, cos, sin, heads):
    """Rows [n, H] before a layer -> what attention reads, as ``turn`` writes it; ``cos`` [rotations, n, r]."""
    eps, rotation = _float(record, EPS), record[ROTATION]
    matrix, norm, of_queries = _matrix(record, HEADS), _norm(record, BEFORE), _norm(record, OF_QUERIES)
    products = product(box, taken(box, hidden, norm, eps, _size(record, HEADS), matrix), matrix)
    starts = record[STARTS], record[STARTS + 1], record[STARTS + 2]
    head_norms = of_queries, _norm(record, OF_KEYS), of_queries[:0]
    width = cos.shape[2] if record[IS_TURNED] else 0
    turn_rows(box, products, starts, head_norms, eps, cos[rotation], sin[rotation], width, heads)


@inlined
def _attend(box, record, table, heads, attended, hidden):
    """To rows [n, H] before a layer what they attend to, times the output matrix. ``table``: as of all that attends."""
    write_and_attend(box, table, heads[0], heads[1], heads[2], _float(record, FACTOR), attended)
    eps, norm, matrix = _float(record, EPS), _norm(record, ATTENDED), _matrix(record, OUTPUT)
    products = product(box, taken(box, attended, norm[:0], eps, _size(record, OUTPUT), matrix), matrix)
    add_rows(box, products, norm, eps, _float(record, MULTIPLIER), hidden)


@inlined
def _add_inner(box, record, hidden):
    """To rows [n, H] behind attention what they run through then, where there are no experts: down(f(gate) * up)."""
    eps, gate_up, down = _float(record, EPS), _matrix(record, GATE_UP), _matrix(record, DOWN)
    given = product(box, taken(box, hidden, _norm(record, INNER), eps, _size(record, GATE_UP), gate_up), gate_up)
    is_gelu, size = record[IS_GELU] != 0, _size(record, DOWN)
    inner = taken_gates(box, given, record[NUM_INNER], record[UP], is_gelu, size, down)
    add_rows(box, product(box, inner, down), _norm(record, GIVEN), eps, _float(record, MULTIPLIER), hidden)


@compiled
def given_by_experts(box, record, rows):
    """Rows [n, H] -> what their experts give them [n, >= H]; what a row gets does not depend on the rows beside it."""
    (gate_up, one), (down, one_down) = _matrices(record, GATE_UP), _matrices(record, DOWN)
    router, num_kept = array_4(record, ROUTER, np.float32), record[NUM_KEPT]
    chosen, shares = np.empty((len(rows), num_kept), np.int64), np.empty((len(rows), num_kept), np.float32)
    route(parts_of(rows, router.shape[1]), router, record[NUM_EXPERTS], record[IS_NORMED] != 0, chosen, shares)
    order, starts, experts = by_expert(chosen, record[NUM_EXPERTS])
    eps, no_norm = _float(record, EPS), _norm(record, BEFORE)[:0]
    pairs = of_pairs(taken(box, rows, no_norm, eps, _size(record, GATE_UP), one), order, num_kept)
    given = product_by_expert(box, pairs, starts, experts, gate_up)
    is_gelu, size = record[IS_GELU] != 0, _size(record, DOWN)
    inner = taken_gates(box, given, record[NUM_INNER], record[UP], is_gelu, size, one_down)
    given = product_by_expert(box, inner, starts, experts, down)
    found = np.zeros((len(rows), given.shape[1]), np.float32)
    share_out(given, order, shares, found)
    return found


@compiled
def run_layers(box, records, begin, end, tables, cos, sin, heads, attended, hidden):
    """Rows [n, H] through layers, none of which has experts; ``heads`` and ``attended`` are written, too."""
    for i in range(begin, end):
        record = records[i]
        _write_heads(box, record, hidden, cos, sin, heads)
        _attend(box, record, tables[i], heads, attended, hidden)
        _add_inner(box, record, hidden)


@compiled
def run_expert_layers(box, records, begin, end, tables, cos, sin, heads, attended, hidden):
    """As ``run_layers``, of those with experts."""
    for i in range(begin, end):
        record = records[i]
        _write_heads(box, record, hidden, cos, sin, heads)
        _attend(box, record, tables[i], heads, attended, hidden)
        eps, multiplier = _float(record, EPS), _float(record, MULTIPLIER)
        given = given_by_experts(box, record, normalised(hidden, _norm(record, INNER), eps))
        add_rows(box, given, _norm(record, GIVEN), eps, multiplier, hidden)


@compiled
def product_of(box, rows, size, matrix):
    """Rows [n, K] times a matrix -> [n, blocks * LANES]. ``size``: as of ``take``."""
    biases = matrix[4]
    no_norm, eps = biases.ravel()[:0], biases.dtype.type(0)
    return product(box, taken(box, rows, no_norm, eps, size, matrix), matrix)
