"""The words by which a team's threads share out one phase of work at a time, compiled by numba.

A phase is a kind of work, what it works on, and some units, each of which one thread claims and does. Whoever needs the
work done takes the mailbox, describes the phase, and does units too: it waits for units that others have claimed, and
never for a thread to come. Who works alone describes the phase in words of its own.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled
from flowspec.model.team_code import ARRAYS, WORDS_EACH, give_way, load, pause, store, swap
from flowspec.model.vector_code import as_bits, as_float

# What changes often lies in a line of the processor's cache of its own.
TICKET = 0  # units of the phase, above those that are claimed
DONE = 8  # units
CALLED = 16  # helpers that are there, or on their way
OWNER = 24  # whether somebody has a phase
LEAVE = 32  # whether helpers are to go for good
WANTED = 33  # whether there was work for helpers that were away
HELPERS = 34  # how many there are
UNIT_NS = 35  # what a unit takes at least, roughly
WORK = 36  # the address of what does a unit of the phase, a function of the mailbox's address, the unit, and how many
FAILED = 37  # whether a unit found no memory
SPINS = 38  # looks in vain before the core is left to others
COST_NS = 39  # of a unit, roughly
ALONE = 40  # phases that are not shared, since a helper came too late
PENALTY = 41  # how many that are next time
IS_SHARED = 42  # whether this is a team's mailbox, and not one thread's words
TAKE, GATE, ADD, TURN, WRITE, ATTEND = range(43, 49)  # the addresses of what does their units
_NUMBERS = 56
NUM_WORDS = ARRAYS + 16 * WORDS_EACH

SPIN_NS = 100_000  # what ``SPINS`` looks take
_TICKET_BITS, _CLAIMED = 32, (1 << 32) - 1
_UNITS_EACH = 8  # at most, for each thread: some may be late
_LATE = 10  # units' times; whoever had to wait for a helper as long had it without its core
_PENALTIES = 256, 32768  # phases


@compiled
def open_phase(box, cost_ns, most):
    """Where a phase is to be described, and how many units, of ``most``, it is to have; it takes one thread so long.

    Of a mailbox it is the caller's until ``close_phase``.
    """
    count = _num_units(box, cost_ns, most)
    if count > 1:
        box[COST_NS] = np.int64(cost_ns) // count
        return box, count
    own = np.empty(NUM_WORDS, np.int64)
    own[IS_SHARED] = own[FAILED] = 0
    return own, 1


@compiled
def _num_units(box, cost_ns, most):
    """More than one: the mailbox is taken."""
    if not box[HELPERS]:
        return 1
    num_threads = box[HELPERS] + 1
    count = min(np.int64(cost_ns) // box[UNIT_NS], _UNITS_EACH * num_threads, most)
    if count > num_threads:
        count -= count % num_threads
    if count < 2:
        return 1
    if load(box, ALONE) > 0:
        store(box, ALONE, load(box, ALONE) - 1)
        return 1
    called = load(box, CALLED)
    if called < box[HELPERS]:
        store(box, WANTED, 1)
    if not called or not swap(box, OWNER, 0, 1):
        return 1
    return count


@compiled
def spin(looks):
    """Wait for so many looks."""
    for look in range(looks):
        look_away(look, looks)


@compiled
def begin_phase(box, work, count):
    """Let units be claimed of a phase that is described; ``work``: see ``WORK``."""
    box[WORK] = work
    store(box, FAILED, 0)
    store(box, DONE, 0)
    store(box, TICKET, count << _TICKET_BITS)


@compiled
def has_units(box):
    """Whether any is left to be claimed."""
    ticket = load(box, TICKET)
    return ticket & _CLAIMED < ticket >> _TICKET_BITS


@compiled
def claim(box):
    """The number of a unit that is this thread's, and how many there are; -1: all are claimed."""
    while True:
        ticket = load(box, TICKET)
        unit, count = ticket & _CLAIMED, ticket >> _TICKET_BITS
        if unit >= count:
            return -1, count
        if swap(box, TICKET, ticket, ticket + 1):
            return unit, count


@compiled
def close_phase(box, count):
    """Wait until its units are done; whether all of them could be."""
    looks, patience = 0, max(box[SPINS], box[SPINS] * _LATE * box[COST_NS] // SPIN_NS)
    while load(box, DONE) < count:
        looks += 1
        look_away(looks, patience)
    if looks >= patience:
        box[PENALTY] = min(max(2 * box[PENALTY], _PENALTIES[0]), _PENALTIES[1])
        store(box, ALONE, box[PENALTY])
    else:
        box[PENALTY] -= box[PENALTY] >> 8
    is_whole = load(box, FAILED) == 0
    store(box, OWNER, 0)
    return is_whole


@compiled
def look_away(looks, patience):
    """Between two looks at a word, so many of which were in vain; after some the core is left to others."""
    if looks < patience:
        pause()
    else:
        give_way()


@compiled
def put_number(box, place, number):
    box[_NUMBERS + place] = number


@compiled
def number(box, place):
    return box[_NUMBERS + place]


@compiled
def put_float(box, place, value):
    box[_NUMBERS + place] = as_bits(value)


@compiled
def float_of(box, place):
    return as_float(np.int32(box[_NUMBERS + place]))
