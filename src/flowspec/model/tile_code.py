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

from flowspec.model.fetch_code import FetchCode
from flowspec.model.float_tile_code import ROWS, FloatTileCode, write_products
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
BLOCKS = 2  # of outputs, that a tile has where registers hold its sums,
MANY_ROWS = 8  # and rows; else it has one block, and ``ROWS``
MIDDLE = 128  # what is added to codes of 8 bits, so that none is negative

_HIGHEST = 127  # of rows' codes
_BYTES = ir.VectorType(I8, 16)  # what a vector of ARM's holds
_PAIRS = ir.VectorType(I16, 2 * LANES)


@intrinsic
def round_group(typing: Any, values: Any, codes: Any, scales: Any, sums: Any, first: Any, group: Any) -> Any:
    """A group of values, from ``first`` on, to whole numbers of at most 127. ``sums``: of these, negative."""
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
    total = code.neg(_reduced(code, "add", numbers))
    for array, value in ((scales, code.fdiv(highest, F32(_HIGHEST))), (sums, total)):
        place = code.gep(array, [code.mul(group, whole(4))])
        code.store(value, code.bitcast(place, value.type.as_pointer()))
    return context.get_dummy_value()


class TileShape(NamedTuple):
    """Of the largest tile of a kind of weights: what registers hold the sums of."""

    num_rows: int
    num_blocks: int


def shape_of(kind: int, features: Sequence[str]) -> TileShape:
    """``features``: of the processor, as LLVM names them."""
    if kind not in FLOAT_KINDS and "+avx512vnni" in features:
        return TileShape(MANY_ROWS, 1 if kind == WITH_OFFSETS else BLOCKS)
    return TileShape(ROWS, 1)


@constant_intrinsic
def rows_at_once(typing: Any, kind: Any) -> Any:
    """Of the largest tile for weights of a kind."""
    return types.intp(kind), lambda context, *_: whole(shape_of(kind.literal_value, features_of(context)).num_rows)


@constant_intrinsic
def blocks_at_once(typing: Any, kind: Any) -> Any:
    """Of each tile for weights of a kind."""
    return types.intp(kind), lambda context, *_: whole(shape_of(kind.literal_value, features_of(context)).num_blocks)


def _tile(num_rows: int) -> Any:
    """The products of ``num_rows`` rows, from ``row`` on, with as many blocks as a tile has: for compiled functions.

    Meanwhile the next blocks, or a part of them, come from memory.
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
    features = features_of(context)
    if num_rows <= shape_of(kind, features).num_rows:  # else no one gets here
        writer = FloatTileCode if kind in FLOAT_KINDS else _TileCode
        writer(code, features, num_rows, kind).write(arrays, *given[10:])
    return context.get_dummy_value()


class _TileCode:
    """Writes what ``_tile`` is, for weights of one kind in whole numbers."""

    def __init__(self, code: Any, features: Sequence[str], num_rows: int, kind: int) -> None:
        """``features``: of the processor, as LLVM names them."""
        self._code = code
        self._features = features
        self._num_rows = num_rows
        self._most_rows, self._num_blocks = shape_of(kind, features)
        self._kind = kind
        self._vectors = QUADS if kind == EIGHT_BITS else QUADS // 2  # of codes, in a group
        self._dot = _dot_of(features)
        self._is_narrow = is_narrow(features)

    def write(self, arrays: Sequence[Any], row: Any, block: Any) -> None:
        code = self._code
        rows, scales, sums, codes, of_codes, zeros, offsets, biases, products = data_of(arrays, code)
        count, width = cgutils.unpack_tuple(code, arrays[8].shape)
        groups = cgutils.unpack_tuple(code, arrays[0].shape)[1]
        blocks = [code.add(block, whole(index)) for index in range(self._num_blocks)]
        totals = [[cgutils.alloca_once(code, FLOATS) for _ in range(self._num_rows)] for _ in blocks]
        for own, of_block in zip(blocks, totals, strict=True):
            bias = load(code, biases, own, FLOATS)
            for total in of_block:
                code.store(bias, total)
        ahead = FetchCode(code, row, self._num_rows, count, self._most_rows)
        of_group = self._of_group(codes, of_codes, zeros, offsets)
        with cgutils.for_range(code, groups) as loop:
            places = [code.add(code.mul(own, groups), loop.index) for own in blocks]
            for own in blocks:
                following = code.add(own, whole(self._num_blocks))
                for data, num_bytes in of_group:
                    ahead.write(data, num_bytes, following, groups, loop.index)
            weights = [self._weights(codes, of_codes, zeros, offsets, place) for place in places]
            of_rows = [
                code.add(code.mul(code.add(row, whole(index)), groups), loop.index) for index in range(self._num_rows)
            ]
            dots = [self._in_turn(rows, of_rows, codes, place) for place in places] if self._is_narrow else []
            for index, group in enumerate(of_rows):
                of_row, sum_of_row = load(code, scales, group, F32), load(code, sums, group, I32)
                numbers = [self._times(own.zeros, spread(code, sum_of_row)) for own in weights]
                if dots:
                    numbers = [code.add(found, of_block[index]) for found, of_block in zip(numbers, dots, strict=True)]
                else:
                    numbers = self._with_products(numbers, rows, group, [own.quads for own in weights])
                for own, found, of_block in zip(weights, numbers, totals, strict=True):
                    self._add_up(own, found, of_row, sum_of_row, of_block[index])
        for own, of_block in zip(blocks, totals, strict=True):
            write_products(code, products, row, own, width, [code.load(total) for total in of_block])

    def _of_group(self, codes: Any, of_codes: Any, zeros: Any, offsets: Any) -> list[tuple[Any, int]]:
        """What there is of a group for a block, and how many bytes."""
        found = [(codes, self._vectors * QUAD * LANES), (of_codes, 2 * LANES)]
        if self._kind == WITH_ZEROS:
            found.append((zeros, LANES))
        if self._kind == WITH_OFFSETS:
            found.append((offsets, 2 * LANES))
        return found

    def _weights(self, codes: Any, of_codes: Any, zeros: Any, offsets: Any, place: Any) -> _Weights:
        """At a place. Where there are few registers, there are no ``quads``."""
        code, features = self._code, self._features
        quads = [] if self._is_narrow else self._quads(codes, place, [whole(i) for i in range(self._vectors)])
        added = halves(code, features, offsets, place) if self._kind == WITH_OFFSETS else None
        return _Weights(quads, halves(code, features, of_codes, place), self._zeros(zeros, place), added)

    def _times(self, zeros: Any, sums: Any) -> Any:
        """Zero points fit into 16 bits, as sums do, for which there is a faster instruction."""
        code, features = self._code, self._features
        if self._kind != WITH_ZEROS or "+avx2" not in features:
            return code.mul(zeros, sums)
        name, count = ("x86.avx512.pmaddw.d.512", 1) if "+avx512bw" in features else ("x86.avx2.pmadd.wd", 2)
        factors = [code.bitcast(each, _PAIRS) for each in (zeros, sums)]
        return _in_parts(code, count, lambda *parts: call(code, name, parts, I32), *factors)

    def _with_products(
        self, numbers: Sequence[Any], rows: Any, group: Any, quads: Sequence[Sequence[Any]]
    ) -> list[Any]:
        """Of a group of one row with some blocks: numbers and codes of each."""
        code, found = self._code, list(numbers)
        for quad, of_blocks in enumerate(zip(*quads, strict=True)):
            inputs = self._inputs(rows, group, whole(quad))
            found = [self._dot.write(code, total, own, inputs) for total, own in zip(found, of_blocks, strict=True)]
        return found

    def _add_up(self, weights: _Weights, numbers: Any, of_row: Any, sum_of_row: Any, total: Any) -> None:
        """A group's products, in floats. ``of_row``: its scale there; ``sum_of_row``: of its codes, negative."""
        code = self._code
        scale = code.fmul(weights.scales, spread(code, of_row))
        found = fuse(code, code.sitofp(numbers, FLOATS), scale, code.load(total))
        if weights.offsets is not None:
            all_inputs = code.fneg(code.fmul(code.sitofp(sum_of_row, F32), of_row))
            found = fuse(code, weights.offsets, spread(code, all_inputs), found)
        code.store(found, total)

    def _in_turn(self, rows: Any, of_rows: Sequence[Any], codes: Any, place: Any) -> list[Any]:
        """The products of a group of each row with the weights at ``place``, of which few are held at a time."""
        code = self._code
        totals = [cgutils.alloca_once(code, WHOLE) for _ in of_rows]
        for total in totals:
            code.store(all_lanes(0), total)
        with cgutils.for_range(code, whole(self._vectors)) as loop:
            for part, weight in enumerate(self._quads(codes, place, [loop.index])):
                quad = code.add(loop.index, whole(part * self._vectors))
                for group, total in zip(of_rows, totals, strict=True):
                    inputs = self._inputs(rows, group, quad)
                    code.store(self._dot.write(code, code.load(total), weight, inputs), total)
        return [code.load(total) for total in totals]

    def _inputs(self, rows: Any, group: Any, quad: Any) -> Any:
        """The same four for each output."""
        code = self._code
        return spread(code, load(code, rows, code.add(code.mul(group, whole(QUADS)), quad), I32))

    def _quads(self, codes: Any, place: Any, indices: Sequence[Any]) -> list[Any]:
        """Four codes for each output, of the quads with these indices, with 4 bits then of those as far behind."""
        code, first = self._code, self._code.mul(place, whole(self._vectors))
        loaded = [load(code, codes, code.add(first, index), WHOLE) for index in indices]
        if self._kind == EIGHT_BITS:
            return [code.xor(four, all_lanes(0x80808080)) for four in loaded] if self._dot.is_signed else loaded
        low = [code.and_(pairs, all_lanes(0x0F0F0F0F)) for pairs in loaded]
        return low + [code.and_(code.lshr(pairs, all_lanes(4)), all_lanes(0x0F0F0F0F)) for pairs in loaded]

    def _zeros(self, zeros: Any, place: Any) -> Any:
        """What a group's codes mean zero by."""
        if self._kind != WITH_ZEROS:
            return all_lanes(0 if self._dot.is_signed or self._kind == WITH_OFFSETS else MIDDLE)
        return self._code.zext(load(self._code, zeros, place, ir.VectorType(I8, LANES)), WHOLE)


class _Weights(NamedTuple):
    """A group of inputs' with one block."""

    quads: Sequence[Any]  # codes
    scales: Any
    zeros: Any  # what codes mean zero by
    offsets: Any  # or None


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
    eight = ir.Constant(_PAIRS, [8] * (2 * LANES))
    codes, inputs = code.bitcast(codes, _PAIRS), code.bitcast(inputs, _PAIRS)
    even = code.and_(codes, ir.Constant(_PAIRS, [255] * (2 * LANES))), code.ashr(code.shl(inputs, eight), eight)
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


eight_rows, four_rows, two_rows, one_row = _tile(MANY_ROWS), _tile(ROWS), _tile(2), _tile(1)
