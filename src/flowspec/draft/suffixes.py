"""An index of token texts by what stands before each token; of bounded size, the oldest tokens forgotten.

Kept as LZ77 compressors keep their window: a ring of tokens, and for each width a table from the hash of so many tokens
to the newest place behind them, from where a chain leads to the older ones. A search compares what it finds with the
text, so a hash that stands for two things, or a chain that leads to what was overwritten, costs time and no truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowspec.tree import Ints

MAX_FOUND = 64  # places that a search looks at, the newest ones
BETWEEN = -1  # stands between two texts, and for what comes after the last token
_MIX = 0x9E3779B97F4A7C15  # an odd number without a pattern: 2**64 by the golden ratio


@dataclass(frozen=True)
class Places:
    """Where what was searched for occurs: [n], newest first.

    ``lengths``: how many tokens of the context stand before each place. ``following`` [n, steps]: the tokens from there
    on, ``BETWEEN`` behind the end of a text.
    """

    lengths: Ints
    following: Ints


class Suffixes:
    """Texts, one behind the other, of which the last ``capacity`` tokens are found."""

    def __init__(self, capacity: int, widths: Sequence[int]) -> None:
        """``widths``: the lengths of context by which places are found, the longest that has any; ascending."""
        self._capacity = capacity
        self._widths = tuple(widths)
        # Zeros are pages that take no memory until they are written.
        self._ring = np.zeros(capacity, dtype=np.int32)
        self._heads = np.zeros((len(widths), capacity), dtype=np.int32)  # by hash: slot of the newest place, plus one
        self._chains = np.zeros((len(widths), capacity), dtype=np.int32)  # by slot: the next older place's, plus one
        self.num_added = 0  # a token's number counts from the first ever; its slot is the number modulo the capacity
        self._first = 0  # number of the oldest token that is found
        self._num_indexed = 0  # of what was added: the rest is once somebody searches

    @property
    def num_tokens(self) -> int:
        """That are found, what stands between texts included."""
        return self.num_added - self._first

    @property
    def max_bytes(self) -> int:
        """That it takes once it is full."""
        return self._ring.nbytes + self._heads.nbytes + self._chains.nbytes

    def tail(self, num: int) -> list[int]:
        """The last ``num`` tokens, or all."""
        return self._at(np.arange(max(self._first, self.num_added - num), self.num_added)).tolist()

    def forget(self, first: int) -> None:
        """Find nothing before the token of this number."""
        self._first = max(self._first, first)

    def add(self, token_ids: Sequence[int]) -> None:
        """Append to the newest text, or begin one with ``BETWEEN``. At most ``capacity`` at once."""
        if not len(token_ids):
            return
        assert len(token_ids) <= self._capacity
        numbers = np.arange(self.num_added, self.num_added + len(token_ids))
        self._ring[numbers % self._capacity] = token_ids
        self.num_added += len(token_ids)
        self.forget(self.num_added - self._capacity)

    def _index_all(self) -> None:
        """What was added since the last search: plain decoding with a draft at hand never searches."""
        if self._num_indexed == self.num_added:
            return
        numbers = np.arange(max(self._num_indexed, self._first), self.num_added)
        for width, heads, chains in zip(self._widths, self._heads, self._chains, strict=True):
            self._index(numbers[numbers >= self._first + width], width, heads, chains)
        self._num_indexed = self.num_added

    def _index(self, numbers: Ints, width: int, heads: NDArray[np.int32], chains: NDArray[np.int32]) -> None:
        """Let these places be found by the ``width`` tokens before each, unless they span two texts."""
        if not len(numbers):
            return
        span = self._at(np.arange(numbers[0] - width, numbers[-1] + 1))
        windows = np.lib.stride_tricks.sliding_window_view(span, width + 1)
        is_whole = (windows != BETWEEN).all(axis=1)
        windows, slots = windows[is_whole, :width], (numbers[is_whole] % self._capacity).astype(np.int32)
        hashes = self._hash(windows)
        order = np.argsort(hashes, kind="stable")
        is_first = np.diff(hashes[order], prepend=-1) != 0
        older = np.roll(slots[order], 1) + 1
        older[is_first] = heads[hashes[order][is_first]]
        chains[slots[order]] = older
        heads[hashes] = slots + 1  # of equal hashes the last one stays

    def _hash(self, windows: Ints) -> Ints:
        """[n, width] -> [n], below the capacity."""
        mixed = np.zeros(len(windows), dtype=np.uint64)
        for column in windows.T.astype(np.uint64):
            mixed = (mixed ^ column) * np.uint64(_MIX)
            mixed ^= mixed >> np.uint64(29)
        return (mixed % np.uint64(self._capacity)).astype(np.int64)

    def _at(self, numbers: Ints) -> Ints:
        return self._ring[numbers % self._capacity].astype(np.int64)

    def find(
        self, context: Sequence[int], steps: int, min_length: int = 0, behind: Sequence[int] = ()
    ) -> Places | None:
        """Where the end of ``context`` occurs, ``min_length`` tokens of it or more, and what follows there.

        ``behind``: what stands behind the newest text, though it has not been added.
        """
        self._index_all()
        for width, heads, chains in reversed(list(zip(self._widths, self._heads, self._chains, strict=True))):
            if not min_length <= width <= len(context):
                continue
            window = np.array(context[-width:], dtype=np.int64)
            numbers = self._walk(int(heads[self._hash(window[None])[0]]), chains, width)
            lengths = self._match(numbers, np.array(context[::-1], dtype=np.int64))
            # A chain may lead to where a text has ended since: what followed there was overwritten.
            is_real = (lengths >= width) & (self._at(numbers) != BETWEEN)
            if is_real.any():
                return Places(lengths[is_real], self._following(numbers[is_real], steps, behind))
        return None

    def _walk(self, link: int, chains: NDArray[np.int32], width: int) -> Ints:
        """The numbers of the places along a chain, falling."""
        numbers: list[int] = []
        last, newest, capacity = self.num_added, self.num_added - 1, self._capacity
        while link and len(numbers) < MAX_FOUND:
            number = newest - (newest - link + 1) % capacity
            if number >= last or number < self._first + width:
                break  # what it led to was overwritten
            numbers.append(number)
            last, link = number, int(chains[link - 1])
        return np.array(numbers, dtype=np.int64)

    def _match(self, numbers: Ints, reversed_context: Ints) -> Ints:
        """How many tokens before each of the places are those of the context."""
        before = numbers[:, None] - np.arange(1, len(reversed_context) + 1)
        is_equal = (self._at(before) == reversed_context) & (before >= self._first)
        return np.logical_and.accumulate(is_equal, axis=1).sum(axis=1)

    def _following(self, numbers: Ints, steps: int, behind: Sequence[int]) -> Ints:
        after = numbers[:, None] + np.arange(steps)
        more = np.full(steps + 1, BETWEEN, dtype=np.int64)
        more[: min(steps, len(behind))] = behind[:steps]
        past = (after - self.num_added).clip(min=0, max=steps)
        return np.where(after < self.num_added, self._at(after), more[past])

    def known_length(self, token_ids: Ints) -> int:
        """How long a beginning of a text the index holds already, piece by piece."""
        start, width, steps = 0, self._widths[-1], 512
        while start < len(token_ids):
            begin = min(start, len(token_ids) - 2 * width)
            if begin < 0:
                break
            piece = token_ids[begin : begin + width + steps]
            places = self.find(piece[:width].tolist(), len(piece) - width, width)
            if places is None:
                break
            is_equal = places.following == piece[width:]
            length = width + int(np.logical_and.accumulate(is_equal, axis=1).sum(axis=1).max())
            if length < 4 * width and begin + length < len(token_ids):
                break
            start = begin + length
        return start
