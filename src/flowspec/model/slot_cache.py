"""Keys and values of one request for ``slot_kernel``, and what the rows of a segment see of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowspec.model.slot_kernel import BLOCK, KEYS, NUM_FIELDS
from flowspec.model.slots import SlotTable
from flowspec.model.vector_code import LANES

Floats = NDArray[np.float32 | np.float16]


class Paths(NamedTuple):
    """What rows see: row i the slots ``slots[starts[i]:starts[i + 1]]``, by position."""

    starts: NDArray[np.int64]  # [n + 1]
    slots: NDArray[np.int32]
    num_shared: int  # so many of its first ones are the same for all rows

    @classmethod
    def of(cls, mask: NDArray[np.bool_], positions: NDArray[np.int64]) -> Paths:
        """``mask``: of n rows over all slots, [n, slots]; ``positions``: by slot."""
        order = np.argsort(positions[: mask.shape[1]], kind="stable")
        by_position = mask[:, order]
        rows, places = np.nonzero(by_position)
        starts = np.searchsorted(rows, np.arange(len(mask) + 1))
        num_seeing = by_position.sum(axis=0)
        seen_by_all = num_seeing == len(mask)
        is_first_part = np.cumsum((num_seeing > 0) & ~seen_by_all) == 0
        num_shared = int((seen_by_all & is_first_part).sum())
        return cls(starts, order[places].astype(np.int32), num_shared)


class SlotCache:
    """Keys and values of one request in the layers of one stage, in the form that the kernel reads.

    The table decides which slot a row has. Arrays are made at the first row and grown with the table; dead slots
    are reused and never given back.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, is_half: bool = False, root_id: int | None = None
    ) -> None:
        """``is_half``: in float16, instead of float32."""
        self.slots = SlotTable(root_id)
        width = -(-head_dim // LANES) * LANES
        dtype = np.float16 if is_half else np.float32
        self._keys: list[Floats] = [np.zeros((num_kv_heads, 0, head_dim, BLOCK), dtype)] * num_layers
        self._values: list[Floats] = [np.zeros((num_kv_heads, 0, width), dtype)] * num_layers
        self._places = np.array([[0, 0, 0, num_kv_heads, is_half]] * num_layers, np.int64)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self._keys, *self._values))

    def places(self) -> NDArray[np.int64]:
        """For each layer the addresses of its keys and values, and their blocks and heads, with room for all slots; and
        whether they are float16.

        They hold until slots are placed.
        """
        num_blocks = -(-self.slots.capacity // BLOCK)
        if self._places[0, 2] != num_blocks:
            for layer, places in enumerate(self._places):
                self._keys[layer] = _with_length(self._keys[layer], num_blocks)
                self._values[layer] = _with_length(self._values[layer], num_blocks * BLOCK)
                places[:3] = self._keys[layer].ctypes.data, self._values[layer].ctypes.data, num_blocks
        return self._places


class RequestRows:
    """The rows of one request in a forward."""

    def __init__(self, first: int, slots: NDArray[np.int64], paths: dict[str, Paths], cache: SlotCache) -> None:
        """``first``: of its rows, in the forward; ``paths``: by type of layer."""
        self._first = first
        self._slots = np.ascontiguousarray(slots)
        self._paths = paths
        self._cache = cache

    def described(self, types: Sequence[str]) -> NDArray[np.int64]:
        """As ``slot_kernel`` takes it, for layers of some types: [layers, fields].

        It holds as long as this, and until slots are placed.
        """
        table = np.empty((len(types), NUM_FIELDS), np.int64)
        for name, paths in self._paths.items():
            starts, slots = paths.starts.ctypes.data, paths.slots.ctypes.data
            seen = int(paths.slots.min()) // BLOCK * BLOCK, (int(paths.slots.max()) // BLOCK + 1) * BLOCK
            where = self._first, self._first + len(self._slots), self._slots.ctypes.data
            table[[each == name for each in types], :KEYS] = (
                *where, starts, slots, len(paths.slots), paths.num_shared, *seen,
            )  # fmt: skip
        table[:, KEYS:] = self._cache.places()
        return table


def _with_length(array: Any, length: int) -> Any:
    """With so many blocks or slots in its second axis, new ones with zeros, as what the kernel may read must be."""
    if array.shape[1] == length:
        return array
    grown = np.zeros((array.shape[0], length, *array.shape[2:]), array.dtype)
    grown[:, : array.shape[1]] = array
    return grown
