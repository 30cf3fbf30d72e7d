"""What the threads of a team do in one phase of a stage's work, compiled by numba: the same as one thread does alone.

A phase is described in words, as ``shared_kernel`` does, and the functions that do its units are called by their
addresses: so each kernel is compiled once, and only if it is needed, instead of into all that need it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from flowspec.model.compiled import callback, compiled, inlined
from flowspec.model.mailbox_kernel import (
    CALLED,
    DONE,
    FAILED,
    HELPERS,
    IS_SHARED,
    LEAVE,
    NUM_WORDS,
    SPINS,
    WANTED,
    WORK,
    begin_phase,
    claim,
    close_phase,
    float_of,
    has_units,
    look_away,
    number,
)
from flowspec.model.matrix_kernel import multiply, take
from flowspec.model.row_kernel import add as add_products
from flowspec.model.row_kernel import gated, normalised, turn
from flowspec.model.slot_kernel import attend, write
from flowspec.model.team_code import (
    add,
    address_of,
    array_1,
    array_2,
    array_3,
    array_4,
    array_at,
    call,
    load,
    store,
    swap,
)
from flowspec.model.tile_code import BLOCKS

_YIELDS = 2000  # of a helper, before it leaves: about a millisecond


@compiled
def share_of(part, count, length):
    """Begin and end of one of ``count`` parts."""
    return part * length // count, (part + 1) * length // count


@inlined
def _taken(box, place):
    """Rows as ``multiply`` reads them, or they are to be written: codes, scales, sums."""
    scales, sums = array_2(box, place + 1, np.float32), array_2(box, place + 2, np.int32)
    return array_3(box, place, np.int8), scales, sums


@inlined
def _norm(box, place):
    return array_1(box, place, np.float32)


@inlined
def _heads(box, place):
    return array_3(box, place, np.float32)


@cache
def multiplier(kind: int) -> int:
    """The address of what multiplies rows with a matrix of some kind; see ``mailbox_kernel.WORK``."""

    def multiply_rows(address, unit, count):
        box = array_at(address, (NUM_WORDS,), np.int64)
        products = array_2(box, 8, np.float32)
        codes, of_codes = array_3(box, 3, np.uint8), array_3(box, 4, np.uint16)
        zeros, offsets = array_3(box, 5, np.uint8), array_3(box, 6, np.uint16)
        matrix = codes, of_codes, zeros, offsets, array_2(box, 7, np.float32)
        rows, scales, sums = _taken(box, 0)
        first, last = share_of(unit, count, len(codes) // BLOCKS)
        first, last = BLOCKS * first, BLOCKS * last
        multiply(rows, scales, sums, 0, len(rows), matrix, kind, first, last, products)

    return callback(multiply_rows).address


@cache
def multiplier_by_expert(kind: int) -> int:
    """As ``multiplier``, of rows that lie by the experts whose matrices they run through."""

    def multiply_by_expert(address, unit, count):
        box = array_at(address, (NUM_WORDS,), np.int64)
        products = array_2(box, 8, np.float32)
        codes, of_codes = array_4(box, 3, np.uint8), array_4(box, 4, np.uint16)
        zeros, offsets = array_4(box, 5, np.uint8), array_4(box, 6, np.uint16)
        biases = array_3(box, 7, np.float32)
        rows, scales, sums = _taken(box, 0)
        starts, experts = array_1(box, 9, np.int64), array_1(box, 10, np.int64)
        first, last = share_of(unit, count, codes.shape[1] // BLOCKS)
        first, last = BLOCKS * first, BLOCKS * last
        for j in range(len(experts)):
            expert = experts[j]
            matrix = codes[expert], of_codes[expert], zeros[expert], offsets[expert], biases[expert]
            multiply(rows, scales, sums, starts[j], starts[j + 1], matrix, kind, first, last, products)

    return callback(multiply_by_expert).address


def take_rows(address, unit, count):
    """Rows as ``multiply`` reads them, normalised before if a norm has their width."""
    box = array_at(address, (NUM_WORDS,), np.int64)
    rows, norm = array_2(box, 0, np.float32), _norm(box, 1)
    codes, scales, sums = _taken(box, 2)
    begin, end = share_of(unit, count, len(rows))
    try:
        own = normalised(rows[begin:end], norm, float_of(box, 0)) if len(norm) else rows[begin:end]
        take(own, number(box, 1), codes[begin:end], scales[begin:end], sums[begin:end])
    except Exception:  # there is no memory
        store(box, FAILED, 1)


def gate_rows(address, unit, count):
    """``gated`` rows as ``multiply`` reads them."""
    box = array_at(address, (NUM_WORDS,), np.int64)
    products = array_2(box, 0, np.float32)
    codes, scales, sums = _taken(box, 1)
    begin, end = share_of(unit, count, len(products))
    try:
        inner = gated(products[begin:end], number(box, 0), number(box, 1), number(box, 2) != 0)
        take(inner, number(box, 3), codes[begin:end], scales[begin:end], sums[begin:end])
    except Exception:
        store(box, FAILED, 1)


def add_rows(address, unit, count):
    """As ``row_kernel.add``."""
    box = array_at(address, (NUM_WORDS,), np.int64)
    products, hidden = array_2(box, 0, np.float32), array_2(box, 2, np.float32)
    begin, end = share_of(unit, count, len(hidden))
    weight, eps, factor = _norm(box, 1), float_of(box, 0), float_of(box, 1)
    try:
        add_products(products[begin:end], weight, eps, factor, hidden[begin:end])
    except Exception:
        store(box, FAILED, 1)


def turn_rows(address, unit, count):
    """As ``row_kernel.turn``."""
    box = array_at(address, (NUM_WORDS,), np.int64)
    products = array_2(box, 0, np.float32)
    norms = _norm(box, 1), _norm(box, 2), _norm(box, 3)
    cos, sin = array_2(box, 4, np.float32), array_2(box, 5, np.float32)
    query, key, value = _heads(box, 6), _heads(box, 7), _heads(box, 8)
    begin, end = share_of(unit, count, len(products))
    heads = query[begin:end], key[begin:end], value[begin:end]
    starts = number(box, 0), number(box, 1), number(box, 2)
    eps, width = float_of(box, 3), number(box, 4)
    try:
        turn(products[begin:end], starts, norms, eps, cos[begin:end], sin[begin:end], width, heads)
    except Exception:
        store(box, FAILED, 1)


def write_rows(address, unit, count):
    """As ``slot_kernel.write``, what a plan says."""
    box = array_at(address, (NUM_WORDS,), np.int64)
    table, plan = array_2(box, 0, np.int64), array_2(box, 1, np.int64)
    key, value = array_3(box, 2, np.float32), array_3(box, 3, np.float32)
    write(table[plan[unit, 0]], plan[unit, 1], plan[unit, 2], key, value)


def attend_rows(address, unit, count):
    """As ``slot_kernel.attend``, what a plan says."""
    box = array_at(address, (NUM_WORDS,), np.int64)
    table, plan = array_2(box, 0, np.int64), array_2(box, 1, np.int64)
    query, attended = array_3(box, 2, np.float32), array_2(box, 3, np.float32)
    rows, heads = (plan[unit, 1], plan[unit, 2]), (plan[unit, 3], plan[unit, 4])
    try:
        attend(table[plan[unit, 0]], rows[0], rows[1], heads[0], heads[1], query, float_of(box, 0), attended)
    except Exception:
        store(box, FAILED, 1)


@compiled
def _work(box):
    """Do units as long as there are any."""
    while True:
        unit, count = claim(box)
        if unit < 0:
            return
        call(box[WORK], address_of(box), unit, count)
        add(box, DONE, 1)


@compiled
def share(box, work, count):
    """Have a phase done that is described, in so many units; ``work``: see ``WORK``."""
    if box[IS_SHARED]:
        begin_phase(box, work, count)
        _work(box)
        is_whole = close_phase(box, count)
    else:
        for unit in range(count):
            call(work, address_of(box), unit, count)
        is_whole = box[FAILED] == 0
    if not is_whole:
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
            _work(box)
            looks = 0
        looks += 1
        look_away(looks, patience)
    add(box, CALLED, -1)
