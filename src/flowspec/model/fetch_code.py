"""How the weights of the next tiles come from memory while one is computed, in the language of numba's compiler."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from flowspec.model.vector_code import I32, whole

_LINE = 64  # bytes that come from memory together


class FetchCode:
    """Writes what a tile asks memory for: the next blocks, or a half of them where other rows' tiles fetch the other.

    It is the first half or the second one, not every other line: a processor that is asked for one line after the
    other gets those that follow by itself, and the tiles of other rows would have nothing to fetch.
    """

    def __init__(self, code: Any, row: Any, num_rows: int, count: Any, most: int) -> None:
        """``row``: the first of a tile's ``num_rows``, of ``count`` in all. ``most``: of any tile, a power of 2."""
        self._code = code
        self._turn = code.and_(code.udiv(code.add(row, whole(most - 1)), whole(most)), whole(1))
        self._is_alone = code.icmp_signed("<=", count, whole(num_rows))

    def write(self, data: Any, num_bytes: int, block: Any, groups: Any, group: Any) -> None:
        """Of a block's ``groups``, of ``num_bytes`` each, a part while the ``group``-th one is multiplied."""
        code = self._code
        begin, half = code.mul(code.mul(block, groups), whole(num_bytes)), num_bytes // 2
        with code.if_else(self._is_alone) as (alone, others):
            with alone:
                self._lines(data, code.add(begin, code.mul(group, whole(num_bytes))), num_bytes)
            with others:
                place = code.add(code.mul(self._turn, groups), group)
                self._lines(data, code.add(begin, code.mul(place, whole(half))), half)

    def _lines(self, data: Any, first: Any, num_bytes: int) -> None:
        code = self._code
        kind = ir.FunctionType(ir.VoidType(), [data.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(code.module, kind, "llvm.prefetch.p0")
        for begin in range(0, num_bytes, _LINE):
            code.call(function, [code.gep(data, [code.add(first, whole(begin))]), I32(0), I32(2), I32(1)])
