"""How threads share memory without Python, in the language of numba's compiler, which is LLVM's.

Atomic words are those of an array of int64. What a thread has written before ``store``, ``swap`` or ``add`` is there
for whoever sees that by ``load``, ``swap`` or ``add``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.np import arrayobj

from flowspec.model.vector_code import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)

ARRAYS = 64  # the first word in which a mailbox tells of arrays
WORDS_EACH = 5  # an address, and up to four lengths

_HAS_YIELD = hasattr(os, "sched_yield")


@intrinsic
def load(typing: Any, words: Any, place: Any) -> Any:
    """A word."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        return code.load_atomic(_word(context, code, signature, given), "acquire", 8)

    return types.int64(words, types.intp), write


@intrinsic
def store(typing: Any, words: Any, place: Any, value: Any) -> Any:
    """Write a word."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        code.store_atomic(given[2], _word(context, code, signature, given), "release", 8)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.int64), write


@intrinsic
def swap(typing: Any, words: Any, place: Any, before: Any, after: Any) -> Any:
    """Write a word if it is ``before``: whether it was."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        found = code.cmpxchg(_word(context, code, signature, given), given[2], given[3], "acq_rel", "acquire")
        return code.extract_value(found, 1)

    return types.boolean(words, types.intp, types.int64, types.int64), write


@intrinsic
def add(typing: Any, words: Any, place: Any, value: Any) -> Any:
    """Add to a word: what it was."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        return code.atomic_rmw("add", _word(context, code, signature, given), given[2], "acq_rel")

    return types.int64(words, types.intp, types.int64), write


@intrinsic
def pause(typing: Any) -> Any:
    """Let the processor know that this thread waits for a word to change."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        triple = code.module.triple
        if triple.startswith("x86_64"):
            code.call(_function(code, ir.VoidType(), [], "llvm.x86.sse2.pause"), [])
        elif triple.startswith(("aarch64", "arm64")):
            code.call(_function(code, ir.VoidType(), [_I32], "llvm.aarch64.hint"), [_I32(1)])
        return context.get_dummy_value()

    return types.void(), write


@intrinsic
def give_way(typing: Any) -> Any:
    """Let other threads have the core, where the system can be asked for it."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        if _HAS_YIELD:
            code.call(_function(code, _I32, [], "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), write


@intrinsic
def array_at(typing: Any, address: Any, shape: Any, dtype: Any) -> Any:
    """An array without gaps, whose numbers begin at this address."""
    kind = types.Array(dtype.dtype, len(shape), "C")

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        return _array(context, code, kind, given[0], cgutils.unpack_tuple(code, given[1]))

    return kind(types.int64, shape, dtype), write


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """Where an array's numbers begin."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        return code.ptrtoint(context.make_array(array)(context, code, given[0]).data, _I64)

    return types.int64(array), write


@intrinsic
def put_arrays(typing: Any, words: Any, place: Any, arrays: Any) -> Any:
    """Tell in a mailbox where arrays of a phase are, from the ``place``-th on; their owner keeps them until that ends.

    They have no gaps.
    """

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        for number, kind in enumerate(arrays):
            found = context.make_array(kind)(context, code, code.extract_value(given[2], number))
            values = [code.ptrtoint(found.data, _I64), *cgutils.unpack_tuple(code, found.shape)]
            own = [given[0], code.add(given[1], _I64(number))]
            for index, value in enumerate(values):
                code.store(value, _word_of_array(context, code, signature, own, index))
        return context.get_dummy_value()

    return types.void(words, types.intp, arrays), write


def _array_from(ndim: int) -> Any:
    """An array that ``put_arrays`` has written of: a function for compiled ones."""

    @intrinsic
    def array(typing: Any, words: Any, place: Any, dtype: Any) -> Any:
        kind = types.Array(dtype.dtype, ndim, "C")

        def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
            words = [_word_of_array(context, code, signature, given, index) for index in range(1 + ndim)]
            address, *shape = map(code.load, words)
            return _array(context, code, kind, address, shape)

        return kind(words, types.intp, dtype), write

    return array


def _array(context: Any, code: Any, kind: Any, address: Any, shape: Sequence[Any]) -> Any:
    found = context.make_array(kind)(context, code)
    width = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides = [_I64(width)]
    for length in reversed(shape[1:]):
        strides.insert(0, code.mul(strides[0], length))
    data = code.inttoptr(address, found.data.type)
    arrayobj.populate_array(found, data, list(shape), strides, width, None)
    return found._getvalue()


@intrinsic
def call(typing: Any, function: Any, address: Any, unit: Any, count: Any) -> Any:
    """The function of three int64 that is at this address."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 3).as_pointer()
        code.call(code.inttoptr(given[0], kind), given[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), write


def _word(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    words = context.make_array(signature.args[0])(context, code, given[0])
    return code.gep(code.bitcast(words.data, _I64.as_pointer()), [given[1]])


def _word_of_array(context: Any, code: Any, signature: Any, given: Sequence[Any], index: int) -> Any:
    place = code.add(code.mul(given[1], _I64(WORDS_EACH)), _I64(ARRAYS + index))
    return _word(context, code, signature, [given[0], place])


def _function(code: Any, result: Any, kinds: Sequence[Any], name: str) -> Any:
    return cgutils.get_or_insert_function(code.module, ir.FunctionType(result, kinds), name)


array_1, array_2, array_3, array_4 = (_array_from(ndim) for ndim in range(1, 5))
