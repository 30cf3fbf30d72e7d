"""What tells kernels of one layer: numbers, and where its arrays are, which are kept as long as that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowspec.model.compiled_matrix import Lanes
from flowspec.model.layer_kernel import ARRAYS_EACH, MATRICES, NUM_FIELDS, NUMBERS_EACH
from flowspec.model.team_code import ARRAYS, WORDS_EACH


class LayerRecord:
    """``words`` are as ``layer_kernel`` reads them."""

    def __init__(self) -> None:
        self.words: NDArray[np.int64] = np.zeros(NUM_FIELDS, np.int64)
        self._arrays: list[NDArray[Any]] = []

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self._arrays)

    def put(self, place: int, *numbers: int | bool) -> None:
        """Numbers, side by side."""
        self.words[place : place + len(numbers)] = numbers

    def put_float(self, place: int, value: np.float32) -> None:
        self.words[place] = value.view(np.int32)

    def put_array(self, place: int, array: NDArray[Any]) -> None:
        """It has no gaps."""
        assert array.flags.c_contiguous
        self._arrays.append(array)
        first = ARRAYS + place * WORDS_EACH
        self.words[first : first + 1 + array.ndim] = array.ctypes.data, *array.shape

    def put_matrix(self, which: int, lanes: Lanes, size: int) -> None:
        """One matrix, or one of each expert. ``size``: inputs that share a scale."""
        *arrays, kind, multiplier = lanes
        self.put(MATRICES + which * NUMBERS_EACH, size, kind, multiplier)
        self.put_arrays(which * ARRAYS_EACH, arrays)

    def put_arrays(self, place: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Side by side."""
        for number, array in enumerate(arrays):
            self.put_array(place + number, array)
