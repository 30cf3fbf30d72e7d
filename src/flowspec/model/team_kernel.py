"""What the threads of a team do in one phase of a stage's work, compiled by numba: the same as one thread does alone.

A phase is described in the mailbox; the functions that describe phases are those of ``shared_kernel``.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.mailbox_kernel import (
    CALLED,
    DONE,
    FAILED,
    HELPERS,
    KIND,
    LEAVE,
    NUM_WORDS,
    SPINS,
    WANTED,
    WORK,
    array_1,
    array_2,
    array_3,
    array_4,
    begin_phase,
    claim,
    close_phase,
    float_of,
    has_units,
    look_away,
    number,
)
from flowspec.model.matrix_kernel import multiply, multiply_by_expert, take
from flowspec.model.row_kernel import add as add_products
from flowspec.model.row_kernel import gated, normalised, turn
from flowspec.model.slot_kernel import attend, write
from flowspec.model.team_code import add, call, carray, load, pointer, store, swap

MULTIPLY, MULTIPLY_BY_EXPERT, TAKE, GATE, ADD, TURN, WRITE, ATTEND = range(8)

_YIELDS = 2000  # of a helper, before it leaves: about a millisecond


@compiled
def share_of(part, count, length):
    """Begin and end of one of ``count`` parts."""
    return part * length // count, (part + 1) * length // count


@compiled
def take_rows(rows, norm, eps, size, codes, scales, sums):
    """As ``take``, of rows that are normalised before if ``norm`` has their width."""
    if len(norm):
        take(normalised(rows, norm, eps), size, codes, scales, sums)
    else:
        take(rows, size, codes, scales, sums)


@compiled
def _multiply(box, unit, count):
    products = array_2(box, 8, np.float32)
    codes, zeros, offsets = array_3(box, 3, np.uint8), array_3(box, 5, np.uint8), array_3(box, 6, np.uint16)
    matrix = codes, array_3(box, 4, np.uint16), zeros, offsets, array_2(box, 7, np.float32), number(box, 0)
    rows, scales, sums = array_3(box, 0, np.int8), array_2(box, 1, np.float32), array_2(box, 2, np.int32)
    first, last = share_of(unit, count, len(codes))
    multiply(rows, scales, sums, 0, len(rows), matrix, first, last, products)


@compiled
def _multiply_by_expert(box, unit, count):
    products = array_2(box, 8, np.float32)
    codes, zeros, offsets = array_4(box, 3, np.uint8), array_4(box, 5, np.uint8), array_4(box, 6, np.uint16)
    matrices = codes, array_4(box, 4, np.uint16), zeros, offsets, array_3(box, 7, np.float32), number(box, 0)
    rows, scales, sums = array_3(box, 0, np.int8), array_2(box, 1, np.float32), array_2(box, 2, np.int32)
    starts, experts = array_1(box, 9, np.int64), array_1(box, 10, np.int64)
    first, last = share_of(unit, count, codes.shape[1])
    multiply_by_expert(rows, scales, sums, starts, experts, matrices, first, last, products)


@compiled
def _take(box, unit, count):
    rows, norm = array_2(box, 0, np.float32), array_1(box, 1, np.float32)
    codes, scales, sums = array_3(box, 2, np.int8), array_2(box, 3, np.float32), array_2(box, 4, np.int32)
    begin, end = share_of(unit, count, len(rows))
    eps, size = float_of(box, 0), number(box, 1)
    take_rows(rows[begin:end], norm, eps, size, codes[begin:end], scales[begin:end], sums[begin:end])


@compiled
def _gate(box, unit, count):
    products = array_2(box, 0, np.float32)
    codes, scales, sums = array_3(box, 1, np.int8), array_2(box, 2, np.float32), array_2(box, 3, np.int32)
    begin, end = share_of(unit, count, len(products))
    inner = gated(products[begin:end], number(box, 0), number(box, 1), number(box, 2) != 0)
    take(inner, number(box, 3), codes[begin:end], scales[begin:end], sums[begin:end])


@compiled
def _add(box, unit, count):
    products, weight, hidden = array_2(box, 0, np.float32), array_1(box, 1, np.float32), array_2(box, 2, np.float32)
    begin, end = share_of(unit, count, len(hidden))
    add_products(products[begin:end], weight, float_of(box, 0), float_of(box, 1), hidden[begin:end])


@compiled
def _turn(box, unit, count):
    products, cos, sin = array_2(box, 0, np.float32), array_2(box, 4, np.float32), array_2(box, 5, np.float32)
    norms = array_1(box, 1, np.float32), array_1(box, 2, np.float32), array_1(box, 3, np.float32)
    query, key, value = array_3(box, 6, np.float32), array_3(box, 7, np.float32), array_3(box, 8, np.float32)
    begin, end = share_of(unit, count, len(products))
    heads = query[begin:end], key[begin:end], value[begin:end]
    starts = number(box, 0), number(box, 1), number(box, 2)
    eps, width = float_of(box, 3), number(box, 4)
    turn(products[begin:end], starts, norms, eps, cos[begin:end], sin[begin:end], width, heads)


@compiled
def _write(box, unit):
    table, plan = array_2(box, 0, np.int64), array_2(box, 1, np.int64)
    key, value = array_3(box, 2, np.float32), array_3(box, 3, np.float32)
    write(table[plan[unit, 0]], plan[unit, 1], plan[unit, 2], key, value)


@compiled
def _attend(box, unit):
    table, plan = array_2(box, 0, np.int64), array_2(box, 1, np.int64)
    query, attended = array_3(box, 2, np.float32), array_2(box, 3, np.float32)
    rows, heads = (plan[unit, 1], plan[unit, 2]), (plan[unit, 3], plan[unit, 4])
    attend(table[plan[unit, 0]], rows[0], rows[1], heads[0], heads[1], query, float_of(box, 0), attended)


@compiled
def _perform(box, unit, count):
    kind = box[KIND]
    if kind == MULTIPLY:
        _multiply(box, unit, count)
    elif kind == MULTIPLY_BY_EXPERT:
        _multiply_by_expert(box, unit, count)
    elif kind == TAKE:
        _take(box, unit, count)
    elif kind == GATE:
        _gate(box, unit, count)
    elif kind == ADD:
        _add(box, unit, count)
    elif kind == TURN:
        _turn(box, unit, count)
    elif kind == WRITE:
        _write(box, unit)
    else:
        _attend(box, unit)


@compiled
def work(address):
    """Do units as long as there are any, of the mailbox at an address."""
    box = carray(pointer(address), (NUM_WORDS,), np.int64)
    while True:
        unit, count = claim(box)
        if unit < 0:
            return
        try:
            _perform(box, unit, count)
        except Exception:
            store(box, FAILED, 1)
        add(box, DONE, 1)


@compiled
def share(box, kind, count):
    """Have a phase done whose units are described; for whom ``open_phase`` has given the mailbox to."""
    begin_phase(box, kind, count)
    call(box[WORK], box.ctypes.data)
    if not close_phase(box, count):
        raise MemoryError("a stage's rows do not fit into memory; send fewer at once")


@compiled
def call_helpers(box):
    """How many there are to be woken: those that were wanted, and are away."""
    store(box, WANTED, 0)
    while True:
        called = load(box, CALLED)
        if swap(box, CALLED, called, box[HELPERS]):
            return box[HELPERS] - called


@compiled
def serve(box):
    """Help, until there has been nothing to do for a while."""
    looks, patience = 0, box[SPINS]
    while looks < patience + _YIELDS and not load(box, LEAVE):
        if has_units(box):
            call(box[WORK], box.ctypes.data)
            looks = 0
        looks += 1
        look_away(looks, patience)
    add(box, CALLED, -1)
