"""Products of rows with weights in floats, in the language of numba's compiler, and what all tiles have in common.

Of each output, inputs with even and with odd numbers add up one after the other, then both sums: so a row's bits are
its own, and are the same on every processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from flowspec.model.fetch_code import FetchCode
from flowspec.model.packed import FLOAT16, FLOAT32, GROUP
from flowspec.model.vector_code import (
    F32,
    FLOATS,
    I16,
    I32,
    LANES,
    WHOLE,
    all_lanes,
    data_of,
    fuse,
    halves,
    is_narrow,
    load,
    spread,
    whole,
)

ROWS = 4  # for which a group's weights are read once

_SUMS = 2  # of an output, so that they need not wait for one another
_FEW = 4  # inputs that are multiplied at a time where there are few registers


class FloatTileCode:
    """Writes what ``tile_code`` calls a tile, for weights of one kind."""

    def __init__(self, code: Any, features: Sequence[str], num_rows: int, kind: int) -> None:
        """``features``: of the processor, as LLVM names them."""
        self._code = code
        self._features = features
        self._num_rows = num_rows
        self._kind = kind
        # Twice the sums of four rows would be all registers of a narrow processor.
        self._parts = 2 if is_narrow(features) and num_rows == ROWS else 1
        self._lanes = LANES // self._parts

    def write(self, arrays: Sequence[Any], row: Any, block: Any) -> None:
        code = self._code
        rows, _, _, codes, _, _, _, biases, products = data_of(arrays, code)
        count, width = cgutils.unpack_tuple(code, arrays[8].shape)
        groups = cgutils.unpack_tuple(code, arrays[3].shape)[1]
        totals = [self._first_sums(biases, block, part) for part in range(self._parts)]
        num_bytes = GROUP * LANES * (4 if self._kind == FLOAT32 else 2)
        ahead = FetchCode(code, row, self._num_rows, count, ROWS)
        with cgutils.for_range(code, groups) as loop:
            place = code.add(code.mul(block, groups), loop.index)
            if self._num_rows > 1:  # the processor sees one row's need itself
                ahead.write(codes, num_bytes, code.add(block, whole(1)), groups, loop.index)
            firsts = [
                code.mul(code.add(code.mul(code.add(row, whole(index)), groups), loop.index), whole(GROUP))
                for index in range(self._num_rows)
            ]
            if self._parts == 1:
                self._add_products(totals[0], rows, firsts, codes, place)
            else:
                for part, of_part in enumerate(totals):
                    self._add_part(of_part, rows, firsts, codes, place, part)
        found = [[code.fadd(code.load(one), code.load(other)) for one, other in of_part] for of_part in totals]
        write_products(code, products, row, block, width, [self._joined(parts) for parts in zip(*found, strict=True)])

    def _first_sums(self, biases: Any, block: Any, part: int) -> list[list[Any]]:
        """For each row, in so many of a block's lanes."""
        code, kind = self._code, ir.VectorType(F32, self._lanes)
        bias = load(code, biases, code.add(code.mul(block, whole(self._parts)), whole(part)), kind)
        totals = [[cgutils.alloca_once(code, kind) for _ in range(_SUMS)] for _ in range(self._num_rows)]
        for one, other in totals:
            code.store(bias, one)
            code.store(ir.Constant(kind, [0.0] * self._lanes), other)
        return totals

    def _add_products(
        self, totals: Sequence[Sequence[Any]], rows: Any, firsts: Sequence[Any], codes: Any, place: Any
    ) -> None:
        """Of a group of each row, from its one of ``firsts`` on, with the weights at ``place``."""
        code = self._code
        sums = [[code.load(total) for total in of_row] for of_row in totals]
        for k in range(GROUP):
            weights = self._weights(codes, code.add(code.mul(place, whole(GROUP)), whole(k)))
            for first, of_row in zip(firsts, sums, strict=True):
                inputs = spread(code, load(code, rows, code.add(first, whole(k)), F32))
                of_row[k % _SUMS] = fuse(code, inputs, weights, of_row[k % _SUMS])
        self._store(totals, sums)

    def _add_part(
        self, totals: Sequence[Sequence[Any]], rows: Any, firsts: Sequence[Any], codes: Any, place: Any, part: int
    ) -> None:
        """The same in some lanes, a few inputs after the others: where registers do not hold all sums."""
        code, few = self._code, ir.VectorType(F32, _FEW)
        with cgutils.for_range(code, whole(GROUP // _FEW)) as loop:
            sums = [[code.load(total) for total in of_row] for of_row in totals]
            step = code.mul(loop.index, whole(_FEW))
            inputs = [load(code, rows, code.add(first, step), few, 4) for first in firsts]
            for k in range(_FEW):
                of_input = code.add(code.add(code.mul(place, whole(GROUP)), step), whole(k))
                weights = self._weights(codes, code.add(code.mul(of_input, whole(self._parts)), whole(part)))
                for of_few, of_row in zip(inputs, sums, strict=True):
                    factors = code.shuffle_vector(of_few, of_few, all_lanes(k, self._lanes))
                    of_row[k % _SUMS] = fuse(code, factors, weights, of_row[k % _SUMS])
            self._store(totals, sums)

    def _store(self, totals: Sequence[Sequence[Any]], sums: Sequence[Sequence[Any]]) -> None:
        for of_row, found in zip(totals, sums, strict=True):
            for total, value in zip(of_row, found, strict=True):
                self._code.store(value, total)

    def _joined(self, parts: Sequence[Any]) -> Any:
        """[LANES]."""
        if len(parts) == 1:
            return parts[0]
        return self._code.shuffle_vector(*parts, ir.Constant(WHOLE, list(range(LANES))))

    def _weights(self, codes: Any, place: Any) -> Any:
        """Of one input, for as many outputs as there are in a part."""
        code, count = self._code, self._lanes
        if self._kind == FLOAT32:
            return load(code, codes, place, ir.VectorType(F32, count))
        if self._kind == FLOAT16:
            return halves(code, self._features, codes, place, count=count)
        bits = code.zext(load(code, codes, place, ir.VectorType(I16, count)), ir.VectorType(I32, count))
        return code.bitcast(code.shl(bits, all_lanes(16, count)), ir.VectorType(F32, count))


def write_products(code: Any, products: Any, row: Any, block: Any, width: Any, found: Sequence[Any]) -> None:
    """Of rows from ``row`` on with a block."""
    for index, values in enumerate(found):
        first = code.add(code.mul(code.add(row, whole(index)), width), code.mul(block, whole(LANES)))
        pointer = code.bitcast(code.gep(products, [code.mul(first, whole(4))]), FLOATS.as_pointer())
        code.store(values, pointer, align=4)
