"""What kernels do with vectors of the processor, in the language of numba's compiler, which is LLVM's.

No loop makes that compiler use the instruction that multiplies four small numbers at once and adds them up, so the
inner products of ``integer_kernel`` are written here. Each processor's instructions give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from flowspec.model.packed import GROUP

LANES = 16  # outputs of one block
QUAD = 4  # inputs that one instruction multiplies
QUADS = GROUP // QUAD  # of one group
ROWS = 4  # for which a group's weights are read once
MIDDLE = 128  # what is added to codes of 8 bits, so that none is negative

_HIGHEST = 127  # of rows' codes

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_WHOLE, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)

intrinsic: Any = extending.intrinsic  # what it makes takes neither the first argument nor gives what is returned here


@intrinsic
def as_float(typing: Any, bits: Any) -> Any:
    """The float that has these bits."""
    return types.float32(types.int32), lambda context, code, signature, given: code.bitcast(given[0], _F32)


@intrinsic
def round_group(typing: Any, values: Any, codes: Any, scales: Any, sums: Any, first: Any, group: Any) -> Any:
    """A group of values, from ``first`` on, to whole numbers of at most 127."""
    return types.void(values, codes, scales, sums, types.intp, types.intp), _write_round


def _write_round(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    """numba's interface of code generators."""
    values, codes, scales, sums = _data(_arrays(context, code, signature, given, range(4)), code)
    first, group = given[4:]
    parts = [_load(code, values, code.add(first, _whole(begin)), _FLOATS, 4) for begin in range(0, GROUP, LANES)]
    # Floats without their signs are ordered as whole numbers are, and what is no number comes last.
    sizes = [code.and_(code.bitcast(part, _WHOLE), _all(0x7FFFFFFF)) for part in parts]
    highest = code.bitcast(_reduced(code, "umax", sizes), _F32)
    factor = code.fdiv(_F32(_HIGHEST), highest)
    factor = code.select(code.fcmp_unordered("==", highest, _F32(0)), _F32(0), factor)
    rounded = [_call(code, f"rint.v{LANES}f32", [code.fmul(part, _spread(code, factor))]) for part in parts]
    numbers = [code.fptosi(part, _WHOLE) for part in rounded]
    for index, part in enumerate(numbers):
        small = code.trunc(part, ir.VectorType(_I8, LANES))
        place = code.add(code.mul(group, _whole(GROUP)), _whole(index * LANES))
        code.store(small, code.bitcast(code.gep(codes, [place]), small.type.as_pointer()), align=1)
    for array, value in ((scales, code.fdiv(highest, _F32(_HIGHEST))), (sums, _reduced(code, "add", numbers))):
        place = code.gep(array, [code.mul(group, _whole(4))])
        code.store(value, code.bitcast(place, value.type.as_pointer()))
    return context.get_dummy_value()


@intrinsic
def fused(typing: Any, factor: Any, other: Any, total: Any) -> Any:
    """factor * other + total, float32, rounded once."""

    def write(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        return _call(code, "fma.f32", given)

    return types.float32(*[types.float32] * 3), write


def _fold(name: str) -> Any:
    """The ``name`` of so many lanes of float32, from ``at`` on in their memory: lane by lane, then these in order."""

    @intrinsic
    def fold(typing: Any, values: Any, at: Any, count: Any) -> Any:
        return types.float32(values, types.intp, types.intp), partial(_write_fold, name)

    return fold


def _write_fold(name: str, context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    """numba's interface of code generators."""
    (values,) = _data(_arrays(context, code, signature, given, (0,)), code)
    at, count = given[1:]
    total = cgutils.alloca_once(code, _FLOATS)
    code.store(_load(code, values, at, _FLOATS, 4), total)
    with cgutils.for_range_slice(code, _whole(LANES), count, _whole(LANES), _I64) as (index, _):
        lanes, before = _load(code, values, code.add(at, index), _FLOATS, 4), code.load(total)
        if name == "sum":
            code.store(code.fadd(before, lanes), total)
        else:
            code.store(code.select(code.fcmp_ordered(">", lanes, before), lanes, before), total)
    if name == "sum":
        kind = ir.FunctionType(_F32, [_F32, _FLOATS])
        function = cgutils.get_or_insert_function(code.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return code.call(function, [_F32(0), code.load(total)])
    kind = ir.FunctionType(_F32, [_FLOATS])
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
    factors, rows, sums = _data(_arrays(context, code, signature, given, (0, 3, 6)), code)
    (at, apart), (rows_at, rows_apart), (sums_at, sums_apart) = given[1:3], given[4:6], given[7:9]
    firsts = [code.add(sums_at, code.mul(sums_apart, _whole(line))) for line in range(num_lines)]
    places = [[code.add(first, _whole(LANES * vector)) for vector in range(num_vectors)] for first in firsts]
    totals = [[cgutils.alloca_once(code, _FLOATS) for _ in line] for line in places]
    for line, of_line in zip(places, totals, strict=True):
        for place, total in zip(line, of_line, strict=True):
            code.store(_load(code, sums, place, _FLOATS, 4), total)
    with cgutils.for_range(code, given[9]) as loop:
        first = code.add(rows_at, code.mul(rows_apart, loop.index))
        vectors = [
            _load(code, rows, code.add(first, _whole(LANES * vector)), _FLOATS, 4) for vector in range(num_vectors)
        ]
        for line, of_line in enumerate(totals):
            place = code.add(code.add(at, code.mul(apart, _whole(line))), loop.index)
            factor = _spread(code, _load(code, factors, place, _F32))
            for vector, total in zip(vectors, of_line, strict=True):
                code.store(_call(code, f"fma.v{LANES}f32", [factor, vector, code.load(total)]), total)
    for line, of_line in zip(places, totals, strict=True):
        for place, total in zip(line, of_line, strict=True):
            pointer = code.bitcast(code.gep(sums, [code.mul(place, _whole(4))]), _FLOATS.as_pointer())
            code.store(code.load(total), pointer, align=4)
    return context.get_dummy_value()


def _tile(num_rows: int) -> Any:
    """The products of ``num_rows`` rows, from ``row`` on, with one block: a function for compiled ones.

    Meanwhile a part of the block ``ahead`` comes from memory.
    """

    @intrinsic
    def tile(typing, rows, scales, sums, codes, of_codes, zeros, biases, products, row, block, ahead):
        arrays = rows, scales, sums, codes, of_codes, zeros, biases, products
        return types.void(*arrays, *[types.intp] * 3), partial(_write_tile, num_rows)

    return tile


def _write_tile(num_rows: int, context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    """numba's interface of code generators."""
    arrays = _arrays(context, code, signature, given, range(8))
    features = context.codegen().magic_tuple()[2].split(",")
    has_zeros = code.icmp_signed(">", cgutils.unpack_tuple(code, arrays[5].shape)[0], _whole(0))
    with code.if_else(has_zeros) as (then, otherwise):
        with then:
            _TileCode(code, features, num_rows, 4).write(arrays, *given[8:])
        with otherwise:
            _TileCode(code, features, num_rows, 8).write(arrays, *given[8:])
    return context.get_dummy_value()


class _TileCode:
    """Writes what ``_tile`` is, for weights of so many bits."""

    def __init__(self, code: Any, features: Sequence[str], num_rows: int, bits: int) -> None:
        """``features``: of the processor, as LLVM names them."""
        self._code = code
        self._features = features
        self._num_rows = num_rows
        self._bits = bits
        self._vectors = QUADS * bits // 8  # of codes, in a group
        self._dot = _dot_of(features)

    def write(self, arrays: Sequence[Any], row: Any, block: Any, ahead: Any) -> None:
        code = self._code
        rows, scales, sums, codes, of_codes, zeros, biases, products = _data(arrays, code)
        groups, width = (cgutils.unpack_tuple(code, arrays[index].shape)[1] for index in (0, 7))
        bias = _load(code, biases, block, _FLOATS)
        totals = [cgutils.alloca_once(code, _FLOATS) for _ in range(self._num_rows)]
        for total in totals:
            code.store(bias, total)
        first_ahead = code.mul(ahead, groups)
        half = code.and_(code.udiv(code.add(row, _whole(ROWS - 1)), _whole(ROWS)), _whole(1))
        with cgutils.for_range(code, groups) as loop:
            place = code.add(code.mul(block, groups), loop.index)
            if self._num_rows == ROWS:
                self._fetch(codes, code.add(first_ahead, loop.index), half)
            weights = self._weights(codes, place)
            of_weights = _halves(code, of_codes, place, "+f16c" in self._features or "+neon" in self._features)
            zero = self._zeros(zeros, place)
            for offset, total in enumerate(totals):
                group = code.add(code.mul(code.add(row, _whole(offset)), groups), loop.index)
                found = code.mul(zero, _spread(code, _load(code, sums, group, _I32)))
                for quad, weight in enumerate(weights):
                    inputs = _load(code, rows, code.add(code.mul(group, _whole(QUADS)), _whole(quad)), _I32)
                    found = self._dot.write(code, found, weight, _spread(code, inputs))
                scale = code.fmul(of_weights, _spread(code, _load(code, scales, group, _F32)))
                floats = code.sitofp(found, _FLOATS)
                code.store(_call(code, f"fma.v{LANES}f32", [floats, scale, code.load(total)]), total)
        for offset, total in enumerate(totals):
            first = code.add(code.mul(code.add(row, _whole(offset)), width), code.mul(block, _whole(LANES)))
            pointer = code.bitcast(code.gep(products, [code.mul(first, _whole(4))]), _FLOATS.as_pointer())
            code.store(code.load(total), pointer, align=4)

    def _fetch(self, codes: Any, place: Any, half: Any) -> None:
        """One half of a group's codes; the other one while the next rows are multiplied."""
        code, count = self._code, self._vectors // 2
        kind = ir.FunctionType(ir.VoidType(), [codes.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(code.module, kind, "llvm.prefetch.p0")
        first = code.add(code.mul(place, _whole(self._vectors)), code.mul(half, _whole(count)))
        for index in range(count):
            where = code.gep(codes, [code.mul(code.add(first, _whole(index)), _whole(4 * LANES))])
            code.call(function, [where, _I32(0), _I32(2), _I32(1)])

    def _weights(self, codes: Any, place: Any) -> list[Any]:
        """Four codes for each output and quad of a group."""
        code, first = self._code, self._code.mul(place, _whole(self._vectors))
        loaded = [_load(code, codes, code.add(first, _whole(index)), _WHOLE) for index in range(self._vectors)]
        if self._bits == 8:
            return [code.xor(four, _all(0x80808080)) for four in loaded] if self._dot.is_signed else loaded
        low = [code.and_(pairs, _all(0x0F0F0F0F)) for pairs in loaded]
        return low + [code.and_(code.lshr(pairs, _all(4)), _all(0x0F0F0F0F)) for pairs in loaded]

    def _zeros(self, zeros: Any, place: Any) -> Any:
        """What a group's codes mean zero by, negative."""
        if self._bits == 8:
            return _all(0 if self._dot.is_signed else -MIDDLE)
        return self._code.neg(self._code.zext(_load(self._code, zeros, place, ir.VectorType(_I8, LANES)), _WHOLE))


class _Dot(NamedTuple):
    """How to add to [LANES] whole numbers the products of four codes for each with four inputs, of 8 bits."""

    write: Callable[[Any, Any, Any, Any], Any]  # code, numbers, codes, inputs -> numbers
    is_signed: bool = False  # codes are; else they are above zero


def _dot_of(features: Sequence[str]) -> _Dot:
    """``features``: of the processor, as LLVM names them."""
    if "+avx512vnni" in features:
        return _Dot(_dot_by("x86.avx512.vpdpbusd.512", 1))
    if "+avxvnni" in features:
        return _Dot(_dot_by("x86.avx512.vpdpbusd.256", 2))
    if "+dotprod" in features:
        return _Dot(_dot_by("aarch64.neon.sdot.v4i32.v16i8", 4, ir.VectorType(_I8, LANES)), is_signed=True)
    return _Dot(_dot_by_pairs if "+avx2" in features else _dot_by_one)


def _dot_by(name: str, count: int, kind: Any = None) -> Callable[[Any, Any, Any, Any], Any]:
    """With an instruction for it, of which ``count`` are needed; ``kind``: of its codes and inputs."""

    def write(code: Any, numbers: Any, codes: Any, inputs: Any) -> Any:
        def one(*parts: Any) -> Any:
            quads = parts[1:] if kind is None else [code.bitcast(part, kind) for part in parts[1:]]
            return _call(code, name, [parts[0], *quads])

        return _in_parts(code, count, one, numbers, codes, inputs)

    return write


def _dot_by_pairs(code: Any, numbers: Any, codes: Any, inputs: Any) -> Any:
    """With AVX2: products of 16 bits, added in pairs. What adds up products of 8 bits there would cut them off."""
    pairs, eight = ir.VectorType(_I16, 2 * LANES), ir.Constant(ir.VectorType(_I16, 2 * LANES), [8] * (2 * LANES))
    codes, inputs = code.bitcast(codes, pairs), code.bitcast(inputs, pairs)
    even = code.and_(codes, ir.Constant(pairs, [255] * (2 * LANES))), code.ashr(code.shl(inputs, eight), eight)
    odd = code.lshr(codes, eight), code.ashr(inputs, eight)
    for part in (even, odd):
        products = _in_parts(code, 2, lambda *halves: _call(code, "x86.avx2.pmadd.wd", halves, _I32), *part)
        numbers = code.add(numbers, products)
    return numbers


def _dot_by_one(code: Any, numbers: Any, codes: Any, inputs: Any) -> Any:
    """On any processor."""
    for index in range(QUAD):
        weights = code.and_(code.lshr(codes, _all(8 * index)), _all(255))
        factors = code.ashr(code.shl(inputs, _all(24 - 8 * index)), _all(24))
        numbers = code.add(numbers, code.mul(weights, factors))
    return numbers


def _in_parts(code: Any, count: int, work: Callable[..., Any], *vectors: Any) -> Any:
    """Of vectors that are ``count`` times as long as the processor's, a power of 2."""
    if count == 1:
        return work(*vectors)
    halves = [
        _in_parts(
            code,
            count // 2,
            work,
            *(code.shuffle_vector(each, each, _indices(half, each.type.count // 2)) for each in vectors),
        )
        for half in range(2)
    ]
    return code.shuffle_vector(*halves, _indices(0, 2 * halves[0].type.count))


def _indices(half: int, count: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, count), list(range(half * count, (half + 1) * count)))


def _call(code: Any, name: str, given: Sequence[Any], element: Any = None) -> Any:
    """An instruction of the processor, or of LLVM; what it gives is as the first argument, or has ``element``s."""
    kinds = [each.type for each in given]
    result = kinds[0] if element is None else ir.VectorType(element, kinds[0].count // 2)
    function = cgutils.get_or_insert_function(code.module, ir.FunctionType(result, kinds), f"llvm.{name}")
    return code.call(function, given)


def _reduced(code: Any, name: str, parts: Sequence[Any]) -> Any:
    """One number of two vectors' lanes."""
    one, other = parts
    kind = ir.VectorType(_I32, LANES)
    both = code.add(one, other) if name == "add" else code.select(code.icmp_unsigned(">", one, other), one, other)
    function = cgutils.get_or_insert_function(
        code.module, ir.FunctionType(_I32, [kind]), f"llvm.vector.reduce.{name}.v{LANES}i32"
    )
    return code.call(function, [both])


def _halves(code: Any, bits: Any, place: Any, is_native: bool) -> Any:
    """float16 [LANES] as float32, finite ones. ``is_native``: the processor has an instruction for it."""
    if is_native:
        return code.fpext(_load(code, bits, place, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
    wide = code.zext(_load(code, bits, place, ir.VectorType(_I16, LANES)), _WHOLE)
    size = code.bitcast(code.shl(code.and_(wide, _all(0x7FFF)), _all(13)), _FLOATS)
    size = code.fmul(size, ir.Constant(_FLOATS, [2.0**112] * LANES))
    sign = code.shl(code.and_(wide, _all(0x8000)), _all(16))
    return code.bitcast(code.or_(code.bitcast(size, _WHOLE), sign), _FLOATS)


def _arrays(context: Any, code: Any, signature: Any, given: Sequence[Any], places: Iterable[int]) -> list[Any]:
    """The arguments that are arrays."""
    return [context.make_array(signature.args[place])(context, code, given[place]) for place in places]


def _data(arrays: Iterable[Any], code: Any) -> list[Any]:
    return [code.bitcast(array.data, _I8.as_pointer()) for array in arrays]


def _load(code: Any, data: Any, place: Any, kind: Any, stride: int = 0) -> Any:
    """The ``place``-th one of its kind, or what begins as many times ``stride`` bytes behind."""
    width = kind.count * _bytes(kind.element) if isinstance(kind, ir.VectorType) else _bytes(kind)
    pointer = code.bitcast(code.gep(data, [code.mul(place, _whole(stride or width))]), kind.as_pointer())
    return code.load(pointer, align=stride or width)


def _bytes(kind: Any) -> int:
    return {_F32: 4, ir.HalfType(): 2}.get(kind) or kind.width // 8


def _spread(code: Any, value: Any) -> Any:
    """To all lanes."""
    kind = ir.VectorType(value.type, LANES)
    one = code.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return code.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_WHOLE, [0] * LANES))


def _whole(value: int) -> Any:
    return _I64(value)


def _all(value: int) -> Any:
    return ir.Constant(_WHOLE, [value] * LANES)


four_rows, two_rows, one_row = _tile(ROWS), _tile(2), _tile(1)
four_by_four, two_by_four, one_by_four = _accumulate(4, 4), _accumulate(2, 4), _accumulate(1, 4)
four_by_one, two_by_one, one_by_one = _accumulate(4, 1), _accumulate(2, 1), _accumulate(1, 1)
sum_of, highest_of = _fold("sum"), _fold("highest")
