"""The attention kernel: it is attention, and a row has the same bits whatever slots its tokens have, and whoever is
beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from flowspec.model.families import FULL
from flowspec.model.shared_kernel import write_and_attend
from flowspec.model.slot_cache import Paths, RequestRows, SlotCache
from flowspec.model.slot_kernel import BLOCK, compiled, factor_of, half_of
from flowspec.model.team import Team

Floats = NDArray[np.float32]

NOBODY = Team(1)  # helps


class Rows:
    """Random queries, keys and values of tokens, by position, and a cache that they go to."""

    def __init__(
        self, count: int, num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 16, is_half: bool = False
    ) -> None:
        draw = np.random.default_rng(0)
        self.scaling = head_dim**-0.5
        self.query, self.key, self.value = (
            draw.standard_normal((count, heads, head_dim), dtype=np.float32)
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        self.cache = SlotCache(1, num_kv_heads, head_dim, is_half)
        self.kept_as: Any = np.float16 if is_half else np.float32

    def attend(self, rows: list[int], slots: NDArray[np.int64], paths: Paths) -> Floats:
        heads = self.query[rows], self.key[rows], self.value[rows]
        attended = np.full((len(rows), self.query[0].size), np.nan, np.float32)
        request = RequestRows(0, slots, {FULL: paths}, self.cache)
        write_and_attend(NOBODY.mailbox, request.described([FULL]), *heads, factor_of(self.scaling), attended)
        return attended

    def wanted(self, row: int, seen: list[int]) -> NDArray[np.float64]:
        group = self.query.shape[1] // self.key.shape[1]
        results = []
        keys, values = (kept.astype(self.kept_as).astype(np.float64) for kept in (self.key, self.value))
        for head, query in enumerate(self.query[row].astype(np.float64)):
            scores = keys[seen, head // group] @ query * self.scaling
            weights = np.exp(scores - scores.max())
            results.append(weights / weights.sum() @ values[seen, head // group])
        return np.concatenate(results)


def chain(count: int) -> Paths:
    """Row i sees the rows up to itself, each in the slot of its own number."""
    return Paths.of(np.tri(count, dtype=bool), np.arange(count))


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 16), (4, 4, 10), (3, 1, 7), (8, 1, 256)])
def test_it_is_attention(num_heads: int, num_kv_heads: int, head_dim: int, is_half: bool) -> None:
    rows = Rows(150, num_heads, num_kv_heads, head_dim, is_half)
    slots = rows.cache.slots.append_prefix(range(150))
    attended = rows.attend(list(range(150)), slots, chain(150))
    for row in (0, 1, 7, 8, 63, 64, 65, 149):
        assert np.abs(attended[row] - rows.wanted(row, list(range(row + 1)))).max() < 2e-6


@pytest.mark.parametrize("factor", [1e-3, 30, 1e4])
def test_scores_of_any_size_are_weighed(factor: float) -> None:
    """With large ones all weight is the highest one's, and the others' underflows to nothing."""
    rows = Rows(90)
    rows.query *= np.float32(factor)
    slots = rows.cache.slots.append_prefix(range(90))
    attended = rows.attend(list(range(90)), slots, chain(90))
    errors = [np.abs(attended[row] - rows.wanted(row, list(range(row + 1)))).max() for row in range(90)]
    assert np.isfinite(attended).all() and np.median(errors) < 1e-6 * max(1, factor)


def test_a_window_far_behind_the_first_slots() -> None:
    rows = Rows(400)
    rows.cache.slots.append_prefix(range(400))
    everything = list(range(400))
    rows.attend(everything, np.arange(400), chain(400))
    mask = np.tri(400, dtype=bool) & ~np.tri(400, k=-100, dtype=bool)
    attended = rows.attend([398, 399], np.array([398, 399]), Paths.of(mask[398:], np.arange(400)))
    for found, row in zip(attended, (398, 399), strict=True):
        assert np.abs(found - rows.wanted(row, everything[row - 99 : row + 1])).max() < 2e-6


def test_floats_are_halved_as_numpy_does_it() -> None:
    """All that float16 has, what lies between two of these, and beyond."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (exact[1:] + exact[:-1]) / 2
    values = np.concatenate(
        [exact, between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(1e9))]
    )
    for x in (*values, *-values[:40000:7]):
        assert half_of(x) == x.astype(np.float16).view(np.uint16)
    highest = np.float16(65504).view(np.uint16)
    assert half_of(np.float32(1e9)) == half_of(np.float32(np.inf)) == half_of(np.float32(65520)) == highest
    assert np.isnan(np.uint16(half_of(np.float32(np.nan))).view(np.float16))


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_rows_bits_depend_on_its_own_path_alone(seed: int, is_half: bool) -> None:
    """Tokens of a random tree: at random slots, in random segments, against each path on its own, in order."""
    draw = np.random.default_rng(seed)
    count = 170
    rows = Rows(count, is_half=is_half)
    parents = [-1, *(int(draw.integers(max(0, i - 9), i)) if i > 100 else i - 1 for i in range(1, count))]
    above: list[list[int]] = []
    for row, parent in enumerate(parents):
        above.append([*(above[parent] if row else []), row])
    positions = np.array([len(path) - 1 for path in above])
    slot_of = draw.permutation(count)
    rows.cache.slots.append_prefix(range(count))
    position_of = np.empty(count, np.int64)
    position_of[slot_of] = positions
    found = np.empty((count, rows.query[0].size), np.float32)
    begin = 0
    while begin < count:
        segment = list(range(begin, min(count, begin + int(draw.integers(1, 40)))))
        begin = segment[-1] + 1
        mask = np.zeros((len(segment), count), bool)
        for i, row in enumerate(segment):
            mask[i, slot_of[above[row]]] = True
        found[segment] = rows.attend(segment, slot_of[segment], Paths.of(mask, position_of))
    for row in draw.choice(count, 12, replace=False):
        alone, result = Rows(count, is_half=is_half), np.empty(0)
        for length in range(1, len(above[row]) + 1):
            slots = alone.cache.slots.append_prefix([length - 1])
            seen = Paths.of(np.ones((1, length), bool), np.arange(length))
            result = alone.attend([above[row][length - 1]], slots, seen)
        assert np.array_equal(result[0], found[row])


def test_paths_are_by_position_and_know_how_they_begin() -> None:
    mask = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], bool)
    paths = Paths.of(mask, np.array([5, 5, 1, 0, 2, 99]))
    assert paths.starts.tolist() == [0, 3, 6, 9]
    assert paths.slots.tolist() == [3, 2, 0, 3, 2, 1, 3, 2, 4]
    assert paths.num_shared == 2
    # Of a window: the last row no longer sees what the others begin with.
    assert Paths.of(np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]], bool), np.arange(3)).num_shared == 0
    assert Paths.of(np.ones((1, 3), bool), np.array([2, 1, 0])).num_shared == 3


def test_the_cache_grows_by_blocks_and_keeps_its_rows() -> None:
    rows = Rows(700)
    attended = []
    for begin in range(0, 700, 100):
        segment = list(range(begin, begin + 100))
        slots = rows.cache.slots.append_prefix(segment)
        mask = np.tri(100, begin + 100, begin, dtype=bool)
        attended.append(rows.attend(segment, slots, Paths.of(mask, np.arange(begin + 100))))
    assert rows.cache.num_bytes == 2 * rows.cache.slots.capacity * rows.key[0].nbytes
    whole = Rows(700)
    slots = whole.cache.slots.append_prefix(range(700))
    assert np.array_equal(whole.attend(list(range(700)), slots, chain(700)), np.concatenate(attended))
    odd = SlotCache(1, 2, 16)
    odd.slots.limit = 300
    odd.slots.append_prefix(range(290))
    rows.cache = odd
    rows.attend([0], np.array([289]), Paths.of(np.ones((1, 1), bool), np.arange(1)))
    assert odd.num_bytes == 2 * -(-300 // BLOCK) * BLOCK * rows.key[0].nbytes


def test_without_a_folder_to_keep_it_in_the_kernel_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[..., Any], cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return function

    monkeypatch.setattr(numba, "njit", lambda **options: lambda function: refuse(function, **options))
    assert compiled(len) is len
