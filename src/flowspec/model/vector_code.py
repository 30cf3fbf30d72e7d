"""Vectors of the processor, in the language of numba's compiler, which is LLVM's, and what kernels do with floats.

Whatever is added up here is added in an order of its own, lane by lane, so that results do not depend on the processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
WHOLE, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)

intrinsic: Any = extending.intrinsic  # what it makes takes neither the first argument nor gives what is returned here

constant_intrinsic: Any = extending.intrinsic(prefer_literal=True)  # what is known when it is compiled, it is told


@intrinsic
def as_float(typing: Any, bits: Any) -> Any:
    """The float that has these bits."""
    return types.float32(types.int32), lambda context, code, signature, given: code.bitcast(given[0], F32)


@intrinsic
def as_bits(typing: Any, value: Any) -> Any:
    """The bits of a float."""
    return types.int32(types.float32), lambda context, code, signature, given: code.bitcast(given[0], I32)


@intrinsic
def fused(typing: Any, factor: Any, other: Any, total: Any) -> Any:
    """factor * other + total, float32, rounded once."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        return call(code, "fma.f32", given)

    return types.float32(*[types.float32] * 3), write


def _fold(name: str) -> Any:
    """The ``name`` of so many lanes of float32, from ``at`` on in their memory: lane by lane, then these in order."""

    @intrinsic
    def fold(typing: Any, values: Any, at: Any, count: Any) -> Any:
        return types.float32(values, types.intp, types.intp), partial(_write_fold, name)

    return fold


def _write_fold(name: str, context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    """numba's interface of code generators."""
    (values,) = data_of(arrays_of(context, code, signature, given, (0,)), code)
    at, count = given[1:]
    total = cgutils.alloca_once(code, FLOATS)
    code.store(load(code, values, at, FLOATS, 4), total)
    with cgutils.for_range_slice(code, whole(LANES), count, whole(LANES), I64) as (index, _):
        lanes, before = load(code, values, code.add(at, index), FLOATS, 4), code.load(total)
        if name == "sum":
            code.store(code.fadd(before, lanes), total)
        else:
            code.store(code.select(code.fcmp_ordered(">", lanes, before), lanes, before), total)
    if name == "sum":
        kind = ir.FunctionType(F32, [F32, FLOATS])
        function = cgutils.get_or_insert_function(code.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return code.call(function, [F32(0), code.load(total)])
    kind = ir.FunctionType(F32, [FLOATS])
    function = cgutils.get_or_insert_function(code.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
    return code.call(function, [code.load(total)])


def _accumulate(num_lines: int, num_vectors: int) -> Any:
    """sums[line, lane] += sum over k of factors[line, k] * rows[k, lane], k by k, for so many lines and lanes.

    All arrays are float32; each is followed by where it begins in its memory, and how far its lines lie apart.
    """

    @intrinsic
    def accumulate(typing, factors, at, apart, rows, rows_at, rows_apart, sums, sums_at, sums_apart, count):
        places = types.intp, types.intp
        signature = types.void(factors, *places, rows, *places, sums, *places, types.intp)
        return signature, partial(_write_accumulate, num_lines, num_vectors)

    return accumulate


def _write_accumulate(
    num_lines: int, num_vectors: int, context: Any, code: Any, signature: Any, given: Sequence[Any]
) -> Any:
    """numba's interface of code generators."""
    factors, rows, sums = data_of(arrays_of(context, code, signature, given, (0, 3, 6)), code)
    at_once = vectors_at_once(num_lines, num_vectors, features_of(context))
    for vector in range(0, num_vectors, at_once):
        _write_sums(code, (factors, rows, sums), given, num_lines, range(vector, vector + at_once))
    return context.get_dummy_value()


def vectors_at_once(num_lines: int, num_vectors: int, features: Sequence[str]) -> int:
    """Of each of so many lines, a part of whose sums registers hold."""
    return min(num_vectors, 4 // num_lines) if is_narrow(features) else num_vectors


def _write_sums(code: Any, data: Sequence[Any], given: Sequence[Any], num_lines: int, of_lines: Sequence[int]) -> None:
    """Of so many lines, in some vectors of each. ``data``: of the arrays that are ``given``."""
    factors, rows, sums = data
    (at, apart), (rows_at, rows_apart), (sums_at, sums_apart) = given[1:3], given[4:6], given[7:9]
    firsts = [code.add(sums_at, code.mul(sums_apart, whole(line))) for line in range(num_lines)]
    places = [[code.add(first, whole(LANES * vector)) for vector in of_lines] for first in firsts]
    totals = [[cgutils.alloca_once(code, FLOATS) for _ in line] for line in places]
    for line, of_line in zip(places, totals, strict=True):
        for place, total in zip(line, of_line, strict=True):
            code.store(load(code, sums, place, FLOATS, 4), total)
    with cgutils.for_range(code, given[9]) as loop:
        first = code.add(rows_at, code.mul(rows_apart, loop.index))
        vectors = [load(code, rows, code.add(first, whole(LANES * vector)), FLOATS, 4) for vector in of_lines]
        for line, of_line in enumerate(totals):
            place = code.add(code.add(at, code.mul(apart, whole(line))), loop.index)
            factor = spread(code, load(code, factors, place, F32))
            for vector, total in zip(vectors, of_line, strict=True):
                code.store(fuse(code, factor, vector, code.load(total)), total)
    for line, of_line in zip(places, totals, strict=True):
        for place, total in zip(line, of_line, strict=True):
            pointer = code.bitcast(code.gep(sums, [code.mul(place, whole(4))]), FLOATS.as_pointer())
            code.store(code.load(total), pointer, align=4)


@intrinsic
def widen(typing: Any, halves_: Any, at: Any, found: Any, to: Any, count: Any) -> Any:
    """Write so many float16, in whole lanes, from ``at`` on in their memory, as float32, from ``to`` on."""
    return types.void(halves_, types.intp, found, types.intp, types.intp), _write_widen


def _write_widen(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    """numba's interface of code generators."""
    bits, floats = data_of(arrays_of(context, code, signature, given, (0, 2)), code)
    at, to, count = given[1], *given[3:]
    features = features_of(context)
    with cgutils.for_range_slice(code, whole(0), count, whole(LANES), I64) as (index, _):
        pointer = code.gep(floats, [code.mul(code.add(to, index), whole(4))])
        wide = halves(code, features, bits, code.add(at, index), 2)
        code.store(wide, code.bitcast(pointer, FLOATS.as_pointer()), align=4)
    return context.get_dummy_value()


def call(code: Any, name: str, given: Sequence[Any], element: Any = None) -> Any:
    """An instruction of the processor, or of LLVM; what it gives is as the first argument, or has ``element``s."""
    kinds = [each.type for each in given]
    result = kinds[0] if element is None else ir.VectorType(element, kinds[0].count // 2)
    function = cgutils.get_or_insert_function(code.module, ir.FunctionType(result, kinds), f"llvm.{name}")
    return code.call(function, given)


def fuse(code: Any, factor: Any, other: Any, total: Any) -> Any:
    return call(code, f"fma.v{total.type.count}f32", [factor, other, total])


def features_of(context: Any) -> list[str]:
    """Of the processor, as LLVM names them."""
    return context.codegen().magic_tuple()[2].split(",")


def is_narrow(features: Sequence[str]) -> bool:
    """Whether a processor is an ARM: ``LANES`` are four of its registers, of which it has 32."""
    return "+neon" in features


def arrays_of(context: Any, code: Any, signature: Any, given: Sequence[Any], places: Iterable[int]) -> list[Any]:
    """The arguments that are arrays."""
    return [context.make_array(signature.args[place])(context, code, given[place]) for place in places]


def data_of(arrays: Iterable[Any], code: Any) -> list[Any]:
    return [code.bitcast(array.data, I8.as_pointer()) for array in arrays]


def load(code: Any, data: Any, place: Any, kind: Any, stride: int = 0) -> Any:
    """The ``place``-th one of its kind, or what begins as many times ``stride`` bytes behind."""
    width = kind.count * _bytes(kind.element) if isinstance(kind, ir.VectorType) else _bytes(kind)
    pointer = code.bitcast(code.gep(data, [code.mul(place, whole(stride or width))]), kind.as_pointer())
    return code.load(pointer, align=stride or width)


def _bytes(kind: Any) -> int:
    return {F32: 4, ir.HalfType(): 2}.get(kind) or kind.width // 8


def halves(code: Any, features: Sequence[str], bits: Any, place: Any, stride: int = 0, count: int = LANES) -> Any:
    """float16 [count] as float32, finite ones, from where ``load`` has them. Not every processor has an instruction."""
    numbers, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)
    if "+f16c" in features or is_narrow(features):
        return code.fpext(load(code, bits, place, ir.VectorType(ir.HalfType(), count), stride), floats)
    wide = code.zext(load(code, bits, place, ir.VectorType(I16, count), stride), numbers)
    size = code.bitcast(code.shl(code.and_(wide, all_lanes(0x7FFF, count)), all_lanes(13, count)), floats)
    size = code.fmul(size, ir.Constant(floats, [2.0**112] * count))
    sign = code.shl(code.and_(wide, all_lanes(0x8000, count)), all_lanes(16, count))
    return code.bitcast(code.or_(code.bitcast(size, numbers), sign), floats)


def spread(code: Any, value: Any, count: int = LANES) -> Any:
    """To so many lanes."""
    kind = ir.VectorType(value.type, count)
    one = code.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return code.shuffle_vector(one, ir.Constant(kind, ir.Undefined), all_lanes(0, count))


def whole(value: int) -> Any:
    return I64(value)


def all_lanes(value: int, count: int = LANES) -> Any:
    return ir.Constant(ir.VectorType(I32, count), [value] * count)


four_by_four, two_by_four, one_by_four = _accumulate(4, 4), _accumulate(2, 4), _accumulate(1, 4)
four_by_one, two_by_one, one_by_one = _accumulate(4, 1), _accumulate(2, 1), _accumulate(1, 1)
sum_of, highest_of = _fold("sum"), _fold("highest")
