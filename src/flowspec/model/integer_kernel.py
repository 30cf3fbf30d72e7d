"""Products of rows with packed weights, compiled by numba: whole numbers within a group of inputs, floats between groups.

Rows are rounded to 8 bits, each group of inputs of each row with a scale of its own. The products of a group add up in
whole numbers, whose order does not matter, and groups follow one another: so a row's bits are its own, whatever rows
come with it, and however these are shared out.

Weights lie so that an instruction multiplies four inputs of a row with those of many outputs: outputs are cut into
blocks of ``LANES``, the inputs of a group into quads. ``_tile`` is written in the compiler's own language, since no loop
makes it use that instruction; what surrounds it is numba's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from flowspec.model.packed import GROUP
from flowspec.model.slot_kernel import compiled

LANES = 16  # outputs of one block
QUAD = 4  # inputs that one instruction multiplies
QUADS = GROUP // QUAD  # of one group
ROWS = 4  # rows for which a group's weights are read once

_MIDDLE = 128  # what is added to codes of 8 bits, so that none is negative
_HIGHEST = np.float32(127)
_ZERO, _ONE = np.float32(0), np.float32(1)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_WHOLE, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


@compiled
def multiply(rows, scales, sums, begin, end, matrix, first, step, products):
    """The products of the rows ``[begin, end)`` with the blocks ``first``, ``first + step``, ... of a matrix.

    ``rows`` [n, groups, GROUP], ``scales`` and ``sums`` [n, groups]: as ``quantise`` makes them. ``matrix``: codes,
    scales, zero points and biases of ``IntegerMatrix``. ``products`` [n, blocks * LANES] is written.
    """
    codes, of_codes, zeros, biases = matrix
    for block in range(first, len(codes), step):
        row = begin
        if len(zeros):
            while row + ROWS <= end:
                _four_bits_of_rows(rows, scales, sums, codes, of_codes, zeros, biases, products, row, block)
                row += ROWS
            while row < end:
                _four_bits_of_a_row(rows, scales, sums, codes, of_codes, zeros, biases, products, row, block)
                row += 1
        else:
            while row + ROWS <= end:
                _eight_bits_of_rows(rows, scales, sums, codes, of_codes, zeros, biases, products, row, block)
                row += ROWS
            while row < end:
                _eight_bits_of_a_row(rows, scales, sums, codes, of_codes, zeros, biases, products, row, block)
                row += 1


@compiled
def multiply_by_expert(rows, scales, sums, starts, experts, matrices, first, step, products):
    """As ``multiply``, of the rows ``[starts[j], starts[j + 1])`` with the ``experts[j]``-th of some matrices."""
    codes, of_codes, zeros, biases = matrices
    for j in range(len(experts)):
        expert = experts[j]
        matrix = codes[expert], of_codes[expert], zeros[expert], biases[expert]
        multiply(rows, scales, sums, starts[j], starts[j + 1], matrix, first, step, products)


@compiled
def quantise(rows, size, codes, scales, sums):
    """Round rows [n, K] to 8 bits: ``codes`` [n, groups, GROUP], int8, with ``scales`` and the codes' ``sums``.

    A weight's scale is for ``size`` inputs; where these are no whole groups, each of their last ones is filled up.
    What is no number, or has no end, becomes a scale that is no number.
    """
    highest, probe = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    line = np.zeros(GROUP, np.float32)
    groups = codes.shape[1] // (rows.shape[1] // size)  # for each scale of a weight
    for i in range(len(rows)):
        for group in range(codes.shape[1]):
            first = group // groups * size + group % groups * GROUP
            count = min(GROUP, group // groups * size + size - first)
            for j in range(count):
                line[j] = rows[i, first + j]
            for j in range(count, GROUP):
                line[j] = 0
            scales[i, group], sums[i, group] = _quantise(line, highest, probe, codes, i, group)


@compiled
def _quantise(line, highest, probe, codes, row, group):
    """A group's scale and the sum of its codes; written for the compiler, which makes lanes of such loops alone."""
    for lane in range(LANES):
        highest[lane] = max(np.abs(line[lane]), np.abs(line[LANES + lane]))
        probe[lane] = line[lane] * _ZERO + line[LANES + lane] * _ZERO
    of_all, lost = highest[0], probe[0]
    for lane in range(1, LANES):
        of_all = max(of_all, highest[lane])
        lost += probe[lane]
    factor = _HIGHEST / of_all if of_all > _ZERO else _ZERO
    total = np.int32(0)
    for j in range(GROUP):
        code = np.int32(np.rint(line[j] * factor))
        codes[row, group, j] = np.int8(code)
        total = np.int32(total + code)
    return of_all / _HIGHEST + lost, total


@compiled
def normalise(rows, weight, eps, normed):
    """Root mean square norm of rows [n, K]: ``normed`` [n, K] is written. ``weight`` [K]."""
    partial = np.empty(LANES, np.float32)
    for i in range(len(rows)):
        factor = _inverse_norm(rows, i, 0, rows.shape[1], eps, partial)
        for j in range(rows.shape[1]):
            normed[i, j] = rows[i, j] * factor * weight[j]


@compiled
def _inverse_norm(rows, i, begin, count, eps, partial):
    partial[:] = 0
    full = begin + count // LANES * LANES
    for j in range(begin, full, LANES):
        for lane in range(LANES):
            partial[lane] += rows[i, j + lane] * rows[i, j + lane]
    for j in range(full, begin + count):
        partial[j - full] += rows[i, j] * rows[i, j]
    total = _ZERO
    for lane in range(LANES):
        total += partial[lane]
    return _ONE / np.sqrt(total / np.float32(count) + eps)


@compiled
def add(products, weight, eps, multiplier, hidden):
    """Add ``products`` [n, >= H] times ``multiplier`` to ``hidden`` [n, H], normalised before if a ``weight`` has H."""
    partial = np.empty(LANES, np.float32)
    for i in range(len(hidden)):
        if len(weight):
            factor = _inverse_norm(products, i, 0, hidden.shape[1], eps, partial)
            for j in range(hidden.shape[1]):
                hidden[i, j] += products[i, j] * factor * weight[j] * multiplier
        else:
            for j in range(hidden.shape[1]):
                hidden[i, j] += products[i, j] * multiplier


@compiled
def gate(products, up, is_gelu, gated):
    """``gated`` [n, I] = f(gate) * up, f being SiLU, or GELU as tanh approximates it.

    ``products`` [n, ...]: gates from column 0 on, what they let through from ``up`` on.
    """
    for i in range(len(gated)):
        for j in range(gated.shape[1]):
            x = products[i, j]
            t = x
            if is_gelu:  # x * (1 + tanh(t / 2)) / 2, which is x / (1 + exp(-t))
                t = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
            gated[i, j] = x / (_ONE + _exp(-t)) * products[i, up + j]


@compiled
def _exp(x):
    """2 ** y is 2 ** (its nearest whole number) by the bits of a float, times that of the rest by its Taylor series."""
    power = min(max(x * np.float32(1.4426950408889634), np.float32(-126)), np.float32(126))
    whole = np.floor(power + np.float32(0.5))
    rest = (power - whole) * np.float32(0.6931471805599453)
    series = rest * np.float32(1 / 5040) + np.float32(1 / 720)
    series = series * rest + np.float32(1 / 120)
    series = series * rest + np.float32(1 / 24)
    series = series * rest + np.float32(1 / 6)
    series = series * rest + np.float32(0.5)
    series = series * rest + _ONE
    series = series * rest + _ONE
    return series * _as_float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@compiled
def turn(products, begin, norm, eps, cos, sin, heads):
    """Heads [n, heads, d] from the columns ``[begin, begin + heads * d)``, normalised if ``norm`` has d, and turned.

    ``cos`` and ``sin`` [n, r]: the first r of a head's columns are turned, in pairs that are r / 2 apart.
    """
    partial = np.empty(LANES, np.float32)
    half, size = cos.shape[1] // 2, heads.shape[2]
    for i in range(heads.shape[0]):
        for h in range(heads.shape[1]):
            first = begin + h * size
            if len(norm):
                factor = _inverse_norm(products, i, first, size, eps, partial)
                for d in range(size):
                    products[i, first + d] *= factor * norm[d]
            for d in range(half):
                low, high = products[i, first + d], products[i, first + half + d]
                heads[i, h, d] = low * cos[i, d] - high * sin[i, d]
                heads[i, h, half + d] = high * cos[i, half + d] + low * sin[i, half + d]
            for d in range(2 * half, size):
                heads[i, h, d] = products[i, first + d]


@compiled
def lay_out(codes, groups, laid_out):
    """Codes [N, scales, size], int8 or of 4 bits, as ``multiply`` reads them: [blocks, all groups, bytes of a group].

    ``groups``: of ``GROUP`` inputs, for each scale.
    """
    num_outputs, num_scales, size = codes.shape
    is_small = laid_out.shape[2] < GROUP * LANES
    for n in range(num_outputs):
        block, lane = n // LANES, n % LANES
        for scale in range(num_scales):
            for k in range(size):
                group, j = scale * groups + k // GROUP, k % GROUP
                quad = j // QUAD
                if not is_small:
                    place = (quad * LANES + lane) * QUAD + j % QUAD
                    laid_out[block, group, place] = np.uint8(np.int32(codes[n, scale, k]) + _MIDDLE)
                elif quad < QUADS // 2:
                    laid_out[block, group, (quad * LANES + lane) * QUAD + j % QUAD] |= codes[n, scale, k]
                else:
                    place = ((quad - QUADS // 2) * LANES + lane) * QUAD + j % QUAD
                    laid_out[block, group, place] |= np.uint8(np.int32(codes[n, scale, k]) << 4)


@intrinsic
def _as_float(typing: Any, bits: Any) -> Any:
    """The float that has these bits."""
    return types.float32(types.int32), lambda context, code, signature, given: code.bitcast(given[0], _F32)


def _tile(num_rows: int, bits: int) -> Any:
    """The products of ``num_rows`` rows, from ``row`` on, with one block: a function for compiled ones."""

    @intrinsic
    def tile(typing, rows, scales, sums, codes, of_codes, zeros, biases, products, row, block):  # noqa: ANN001, ANN202
        arrays = rows, scales, sums, codes, of_codes, zeros, biases, products
        return types.void(*arrays, types.intp, types.intp), _TileCode(num_rows, bits).write

    return tile


class _TileCode:
    """Writes what ``_tile`` is."""

    def __init__(self, num_rows: int, bits: int) -> None:
        self._num_rows = num_rows
        self._bits = bits

    def write(self, context: Any, code: Any, signature: Any, given: Sequence[Any]) -> Any:
        """numba's interface of code generators."""
        arrays = [context.make_array(kind)(context, code, value) for kind, value in zip(signature.args, given[:8])]
        rows, scales, sums, codes, of_codes, zeros, biases, products = (
            code.bitcast(array.data, _I8.as_pointer()) for array in arrays
        )
        row, block = given[8:]
        groups = cgutils.unpack_tuple(code, arrays[0].shape)[1]
        width = cgutils.unpack_tuple(code, arrays[7].shape)[1]
        features = context.codegen().magic_tuple()[2].split(",")
        dot = _dot_of(features)
        bias = _load(code, biases, block, _FLOATS)
        totals = [cgutils.alloca_once(code, _FLOATS) for _ in range(self._num_rows)]
        for total in totals:
            code.store(bias, total)
        with cgutils.for_range(code, groups) as loop:
            place = code.add(code.mul(block, groups), loop.index)
            weights = self._weights(code, codes, place)
            of_weights = _halves(code, of_codes, place, "+f16c" in features or "+neon" in features)
            zero = self._zeros(code, zeros, place)
            for offset, total in enumerate(totals):
                group = code.add(code.mul(code.add(row, _whole(offset)), groups), loop.index)
                found = code.mul(zero, _spread(code, _load(code, sums, group, _I32)))
                for quad, weight in enumerate(weights):
                    inputs = _load(code, rows, code.add(code.mul(group, _whole(QUADS)), _whole(quad)), _I32)
                    found = dot(code, found, weight, _spread(code, inputs))
                scale = code.fmul(of_weights, _spread(code, _load(code, scales, group, _F32)))
                code.store(_fused(code, code.sitofp(found, _FLOATS), scale, code.load(total)), total)
        for offset, total in enumerate(totals):
            first = code.add(code.mul(code.add(row, _whole(offset)), width), code.mul(block, _whole(LANES)))
            pointer = code.bitcast(code.gep(products, [code.mul(first, _whole(4))]), _FLOATS.as_pointer())
            code.store(code.load(total), pointer, align=4)
        return context.get_dummy_value()

    def _weights(self, code: Any, codes: Any, place: Any) -> list[Any]:
        """Four codes for each output and quad of a group."""
        count = QUADS * self._bits // 8
        loaded = [
            _load(code, codes, code.add(code.mul(place, _whole(count)), _whole(index)), _WHOLE) for index in range(count)
        ]
        if self._bits == 8:
            return loaded
        low = [code.and_(pairs, _all(0x0F0F0F0F)) for pairs in loaded]
        return low + [code.and_(code.lshr(pairs, _all(4)), _all(0x0F0F0F0F)) for pairs in loaded]

    def _zeros(self, code: Any, zeros: Any, place: Any) -> Any:
        """What a group's codes mean zero by, negative."""
        if self._bits == 8:
            return _all(-_MIDDLE)
        return code.neg(code.zext(_load(code, zeros, place, ir.VectorType(_I8, LANES)), _WHOLE))


def _dot_of(features: Sequence[str]) -> Any:
    """How to add to [LANES] whole numbers the products of four unsigned codes for each with four signed inputs.

    ``features``: of the processor, as LLVM names them.
    """
    if "+avx512vnni" in features:
        return lambda code, found, codes, inputs: _call(code, "x86.avx512.vpdpbusd.512", [found, codes, inputs])
    if "+avxvnni" in features:
        return lambda code, found, codes, inputs: _in_halves(
            code, lambda *parts: _call(code, "x86.avx512.vpdpbusd.256", parts), found, codes, inputs
        )
    return _dot_by_pairs if "+avx2" in features else _dot_by_one


def _dot_by_pairs(code: Any, found: Any, codes: Any, inputs: Any) -> Any:
    """With AVX2: products of 16 bits, added in pairs. What adds up products of 8 bits there would cut them off."""
    pairs, eight = ir.VectorType(_I16, 2 * LANES), ir.Constant(ir.VectorType(_I16, 2 * LANES), [8] * (2 * LANES))
    codes, inputs = code.bitcast(codes, pairs), code.bitcast(inputs, pairs)
    even = code.and_(codes, ir.Constant(pairs, [255] * (2 * LANES))), code.ashr(code.shl(inputs, eight), eight)
    odd = code.lshr(codes, eight), code.ashr(inputs, eight)
    for part in (even, odd):
        products = _in_halves(code, lambda *halves: _call(code, "x86.avx2.pmadd.wd", halves, _I32), *part)
        found = code.add(found, products)
    return found


def _dot_by_one(code: Any, found: Any, codes: Any, inputs: Any) -> Any:
    """On any processor."""
    for index in range(QUAD):
        weights = code.and_(code.lshr(codes, _all(8 * index)), _all(255))
        numbers = code.ashr(code.shl(inputs, _all(24 - 8 * index)), _all(24))
        found = code.add(found, code.mul(weights, numbers))
    return found


def _in_halves(code: Any, work: Any, *vectors: Any) -> Any:
    """Of vectors that are twice as long as the processor's."""
    halves = [
        work(*(code.shuffle_vector(each, each, _indices(half, each.type.count // 2)) for each in vectors))
        for half in range(2)
    ]
    return code.shuffle_vector(*halves, _indices(0, 2 * halves[0].type.count))


def _indices(half: int, count: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, count), list(range(half * count, (half + 1) * count)))


def _call(code: Any, name: str, given: Sequence[Any], element: Any = None) -> Any:
    """An instruction of the processor, or of LLVM; the result is as the first argument, or of as many ``element`` bits."""
    kinds = [each.type for each in given]
    result = kinds[0] if element is None else ir.VectorType(element, kinds[0].count // 2)
    function = cgutils.get_or_insert_function(code.module, ir.FunctionType(result, kinds), f"llvm.{name}")
    return code.call(function, given)


def _fused(code: Any, factor: Any, other: Any, total: Any) -> Any:
    return _call(code, f"fma.v{LANES}f32", [factor, other, total])


def _halves(code: Any, bits: Any, place: Any, is_native: bool) -> Any:
    """float16 [LANES] as float32, finite ones. ``is_native``: the processor has an instruction for it."""
    if is_native:
        return code.fpext(_load(code, bits, place, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
    wide = code.zext(_load(code, bits, place, ir.VectorType(_I16, LANES)), _WHOLE)
    size = code.bitcast(code.shl(code.and_(wide, _all(0x7FFF)), _all(13)), _FLOATS)
    size = code.fmul(size, ir.Constant(_FLOATS, [2.0**112] * LANES))
    sign = code.shl(code.and_(wide, _all(0x8000)), _all(16))
    return code.bitcast(code.or_(code.bitcast(size, _WHOLE), sign), _FLOATS)


def _load(code: Any, data: Any, place: Any, kind: Any) -> Any:
    """The ``place``-th one of its kind."""
    width = kind.count * _bytes(kind.element) if isinstance(kind, ir.VectorType) else _bytes(kind)
    pointer = code.bitcast(code.gep(data, [code.mul(place, _whole(width))]), kind.as_pointer())
    return code.load(pointer, align=width)


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


_eight_bits_of_rows, _eight_bits_of_a_row = _tile(ROWS, 8), _tile(1, 8)
_four_bits_of_rows, _four_bits_of_a_row = _tile(ROWS, 4), _tile(1, 4)
