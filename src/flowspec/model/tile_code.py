"""What kernels do with vectors of the processor, in the language of numba's compiler, which is LLVM's.

No loop makes that compiler use the instruction that multiplies four small numbers at once and adds them up, so the
inner products of ``matrix_kernel`` are written here. Each processor's instructions give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types

from flowspec.model.float_tile_code import ROWS, FloatTileCode, fetch, write_products
from flowspec.model.packed import EIGHT_BITS, FLOAT_KINDS, GROUP, WITH_OFFSETS, WITH_ZEROS
from flowspec.model.vector_code import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    LANES,
    WHOLE,
    all_lanes,
    arrays_of,
    call,
    constant_intrinsic,
    data_of,
    features_of,
    fuse,
    halves,
    intrinsic,
    is_narrow,
    load,
    spread,
    whole,
)

QUAD = 4  # inputs that one instruction multiplies
QUADS = GROUP // QUAD  # of one group
MIDDLE = 128  # what is added to codes of 8 bits, so that none is negative

_HIGHEST = 127  # of rows' codes
_BYTES = ir.VectorType(I8, 16)  # what a vector of ARM's holds


@intrinsic
def round_group(typing: Any, values: Any, codes: Any, scales: Any, sums: Any, first: Any, group: Any) -> Any:
    """A group of values, from ``first`` on, to whole numbers of at most 127."""
    return types.void(values, codes, scales, sums, types.intp, types.intp), _write_round


def _write_round(context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    """numba's interface of code generators."""
    values, codes, scales, sums = data_of(arrays_of(context, code, signature, given, range(4)), code)
    first, group = given[4:]
    parts = [load(code, values, code.add(first, whole(begin)), FLOATS, 4) for begin in range(0, GROUP, LANES)]
    # Floats without their signs are ordered as whole numbers are, and what is no number comes last.
    sizes = [code.and_(code.bitcast(part, WHOLE), all_lanes(0x7FFFFFFF)) for part in parts]
    highest = code.bitcast(_reduced(code, "umax", sizes), F32)
    factor = code.fdiv(F32(_HIGHEST), highest)
    factor = code.select(code.fcmp_unordered("==", highest, F32(0)), F32(0), factor)
    rounded = [call(code, f"rint.v{LANES}f32", [code.fmul(part, spread(code, factor))]) for part in parts]
    numbers = [code.fptosi(part, WHOLE) for part in rounded]
    for index, part in enumerate(numbers):
        small = code.trunc(part, ir.VectorType(I8, LANES))
        place = code.add(code.mul(group, whole(GROUP)), whole(index * LANES))
        code.store(small, code.bitcast(code.gep(codes, [place]), small.type.as_pointer()), align=1)
    for array, value in ((scales, code.fdiv(highest, F32(_HIGHEST))), (sums, _reduced(code, "add", numbers))):
        place = code.gep(array, [code.mul(group, whole(4))])
        code.store(value, code.bitcast(place, value.type.as_pointer()))
    return context.get_dummy_value()


def _tile(num_rows: int) -> Any:
    """The products of ``num_rows`` rows, from ``row`` on, with one block: a function for compiled ones.

    Meanwhile the next block, or a part of it, comes from memory.
    """

    @constant_intrinsic
    def tile(typing, rows, scales, sums, codes, of_codes, zeros, offsets, biases, kind, products, row, block):
        assert isinstance(kind, types.IntegerLiteral), "it is compiled for one kind"
        arrays = rows, scales, sums, codes, of_codes, zeros, offsets, biases
        signature = types.void(*arrays, kind, products, *[types.intp] * 2)
        return signature, partial(_write_tile, num_rows, kind.literal_value)

    return tile


def _write_tile(num_rows: int, kind: int, context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
    """numba's interface of code generators."""
    arrays = arrays_of(context, code, signature, given, (*range(8), 9))
    writer = FloatTileCode if kind in FLOAT_KINDS else _TileCode
    writer(code, features_of(context), num_rows, kind).write(arrays, *given[10:])
    return context.get_dummy_value()


class _TileCode:
    """Writes what ``_tile`` is, for weights of one kind in whole numbers."""

    def __init__(self, code: Any, features: Sequence[str], num_rows: int, kind: int) -> None:
        """``features``: of the processor, as LLVM names them."""
        self._code = code
        self._features = features
        self._num_rows = num_rows
        self._kind = kind
        self._vectors = QUADS if kind == EIGHT_BITS else QUADS // 2  # of codes, in a group
        self._dot = _dot_of(features)
        self._is_narrow = is_narrow(features)

    def write(self, arrays: Sequence[Any], row: Any, block: Any) -> None:
        code = self._code
        rows, scales, sums, codes, of_codes, zeros, offsets, biases, products = data_of(arrays, code)
        count, width = cgutils.unpack_tuple(code, arrays[8].shape)
        groups = cgutils.unpack_tuple(code, arrays[0].shape)[1]
        bias = load(code, biases, block, FLOATS)
        totals = [cgutils.alloca_once(code, FLOATS) for _ in range(self._num_rows)]
        for total in totals:
            code.store(bias, total)
        with cgutils.for_range(code, groups) as loop:
            place = code.add(code.mul(block, groups), loop.index)
            fetch(code, codes, code.add(place, groups), self._vectors, row, count)
            weights = [] if self._is_narrow else self._weights(codes, place, [whole(i) for i in range(self._vectors)])
            of_weights, added = halves(code, self._features, of_codes, place), None
            if self._kind == WITH_OFFSETS:
                added = halves(code, self._features, offsets, place)
            zero = self._zeros(zeros, place)
            of_rows = [
                code.add(code.mul(code.add(row, whole(index)), groups), loop.index) for index in range(self._num_rows)
            ]
            added_up = self._in_turn(rows, of_rows, codes, place) if self._is_narrow else [all_lanes(0)] * len(of_rows)
            for group, numbers, total in zip(of_rows, added_up, totals, strict=True):
                of_row, sum_of_row = load(code, scales, group, F32), load(code, sums, group, I32)
                found = code.add(code.mul(zero, spread(code, sum_of_row)), numbers)
                for quad, weight in enumerate(weights):
                    found = self._with_product(found, rows, group, whole(quad), weight)
                scale = code.fmul(of_weights, spread(code, of_row))
                found = fuse(code, code.sitofp(found, FLOATS), scale, code.load(total))
                if added is not None:
                    all_inputs = code.fmul(code.sitofp(sum_of_row, F32), of_row)
                    found = fuse(code, added, spread(code, all_inputs), found)
                code.store(found, total)
        write_products(code, products, row, block, width, [code.load(total) for total in totals])

    def _in_turn(self, rows: Any, of_rows: Sequence[Any], codes: Any, place: Any) -> list[Any]:
        """The products of a group of each row with the weights at ``place``, of which few are held at a time."""
        code = self._code
        totals = [cgutils.alloca_once(code, WHOLE) for _ in of_rows]
        for total in totals:
            code.store(all_lanes(0), total)
        with cgutils.for_range(code, whole(self._vectors)) as loop:
            for part, weight in enumerate(self._weights(codes, place, [loop.index])):
                quad = code.add(loop.index, whole(part * self._vectors))
                for group, total in zip(of_rows, totals, strict=True):
                    code.store(self._with_product(code.load(total), rows, group, quad, weight), total)
        return [code.load(total) for total in totals]

    def _with_product(self, numbers: Any, rows: Any, group: Any, quad: Any, weight: Any) -> Any:
        code = self._code
        inputs = load(code, rows, code.add(code.mul(group, whole(QUADS)), quad), I32)
        return self._dot.write(code, numbers, weight, spread(code, inputs))

    def _weights(self, codes: Any, place: Any, indices: Sequence[Any]) -> list[Any]:
        """Four codes for each output, of the quads with these indices, with 4 bits then of those as far behind."""
        code, first = self._code, self._code.mul(place, whole(self._vectors))
        loaded = [load(code, codes, code.add(first, index), WHOLE) for index in indices]
        if self._kind == EIGHT_BITS:
            return [code.xor(four, all_lanes(0x80808080)) for four in loaded] if self._dot.is_signed else loaded
        low = [code.and_(pairs, all_lanes(0x0F0F0F0F)) for pairs in loaded]
        return low + [code.and_(code.lshr(pairs, all_lanes(4)), all_lanes(0x0F0F0F0F)) for pairs in loaded]

    def _zeros(self, zeros: Any, place: Any) -> Any:
        """What a group's codes mean zero by, negative."""
        if self._kind != WITH_ZEROS:
            return all_lanes(0 if self._dot.is_signed or self._kind == WITH_OFFSETS else -MIDDLE)
        return self._code.neg(self._code.zext(load(self._code, zeros, place, ir.VectorType(I8, LANES)), WHOLE))


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
        return _Dot(_dot_by("aarch64.neon.sdot.v4i32.v16i8", 4, _BYTES), is_signed=True)
    if is_narrow(features):
        return _Dot(_dot_by_halves, is_signed=True)
    return _Dot(_dot_by_pairs if "+avx2" in features else _dot_by_one)


def _dot_by(name: str, count: int, kind: Any = None) -> Callable[[Any, Any, Any, Any], Any]:
    """With an instruction for it, of which ``count`` are needed; ``kind``: of its codes and inputs."""

    def write(code: Any, numbers: Any, codes: Any, inputs: Any) -> Any:
        def one(*parts: Any) -> Any:
            quads = parts[1:] if kind is None else [code.bitcast(part, kind) for part in parts[1:]]
            return call(code, name, [parts[0], *quads])

        return _in_parts(code, count, one, numbers, codes, inputs)

    return write


def _dot_by_pairs(code: Any, numbers: Any, codes: Any, inputs: Any) -> Any:
    """With AVX2: products of 16 bits, added in pairs. What adds up products of 8 bits there would cut them off."""
    pairs, eight = ir.VectorType(I16, 2 * LANES), ir.Constant(ir.VectorType(I16, 2 * LANES), [8] * (2 * LANES))
    codes, inputs = code.bitcast(codes, pairs), code.bitcast(inputs, pairs)
    even = code.and_(codes, ir.Constant(pairs, [255] * (2 * LANES))), code.ashr(code.shl(inputs, eight), eight)
    odd = code.lshr(codes, eight), code.ashr(inputs, eight)
    for part in (even, odd):
        products = _in_parts(code, 2, lambda *halves: call(code, "x86.avx2.pmadd.wd", halves, I32), *part)
        numbers = code.add(numbers, products)
    return numbers


def _dot_by_halves(code: Any, numbers: Any, codes: Any, inputs: Any) -> Any:
    """With ARM's vectors: products of 16 bits, which two of still fit into, added in pairs, and then in pairs again."""

    def one(numbers: Any, *quads: Any) -> Any:
        factors = [code.bitcast(part, _BYTES) for part in quads]
        halves = [
            [code.sext(code.shuffle_vector(part, part, _indices(half, 8)), ir.VectorType(I16, 8)) for part in factors]
            for half in range(2)
        ]
        pairs = call(code, "aarch64.neon.addp.v8i16", [code.mul(*half) for half in halves])
        return code.add(numbers, call(code, "aarch64.neon.saddlp.v4i32.v8i16", [pairs], I32))

    return _in_parts(code, 4, one, numbers, codes, inputs)


def _dot_by_one(code: Any, numbers: Any, codes: Any, inputs: Any) -> Any:
    """On any processor."""
    for index in range(QUAD):
        weights = code.and_(code.lshr(codes, all_lanes(8 * index)), all_lanes(255))
        factors = code.ashr(code.shl(inputs, all_lanes(24 - 8 * index)), all_lanes(24))
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
    return ir.Constant(ir.VectorType(I32, count), list(range(half * count, (half + 1) * count)))


def _reduced(code: Any, name: str, parts: Sequence[Any]) -> Any:
    """One number of two vectors' lanes."""
    one, other = parts
    kind = ir.VectorType(I32, LANES)
    both = code.add(one, other) if name == "add" else code.select(code.icmp_unsigned(">", one, other), one, other)
    function = cgutils.get_or_insert_function(
        code.module, ir.FunctionType(I32, [kind]), f"llvm.vector.reduce.{name}.v{LANES}i32"
    )
    return code.call(function, [both])


four_rows, two_rows, one_row = _tile(ROWS), _tile(2), _tile(1)
