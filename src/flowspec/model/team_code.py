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
from numba.np import numpy_support

from flowspec.model.vector_code import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
carray: Any = numpy_support.carray  # an array of a pointer and a shape

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
def pointer(typing: Any, address: Any) -> Any:
    """What ``carray`` makes an array of."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        return code.inttoptr(given[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), write


@intrinsic
def call(typing: Any, function: Any, value: Any) -> Any:
    """The function of an int64 that is at this address."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64]).as_pointer()
        code.call(code.inttoptr(given[0], kind), [given[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), write


def _word(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    words = context.make_array(signature.args[0])(context, code, given[0])
    return code.gep(code.bitcast(words.data, _I64.as_pointer()), [given[1]])


def _function(code: Any, result: Any, kinds: Sequence[Any], name: str) -> Any:
    return cgutils.get_or_insert_function(code.module, ir.FunctionType(result, kinds), name)
