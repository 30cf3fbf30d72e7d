"""What earlier requests have read and written, for the drafts of those that follow (SuffixDecoding, arXiv 2411.04975).

It holds tokens of everybody's prompts and answers. They guide guesses, and a guess that the target does not make itself
is never emitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from flowspec.draft.suffixes import BETWEEN, Places, Suffixes

MAX_TEXTS = 10_000
CONTEXT = 24  # tokens before a place that are compared at most
WIDTHS = (4, 8)
BYTES_PER_TOKEN = 4 + 8 * len(WIDTHS)


class Memory:
    """The texts of the last requests, shared by all drafts of a driver; only the driver's thread may use it."""

    def __init__(self, num_tokens: int, max_texts: int = MAX_TEXTS) -> None:
        """``num_tokens``: kept at most, in ``BYTES_PER_TOKEN`` each; the oldest ones make room."""
        self._index = Suffixes(num_tokens, WIDTHS)
        self._capacity = num_tokens
        self._starts: deque[int] = deque(maxlen=max_texts)

    @property
    def num_tokens(self) -> int:
        return self._index.num_tokens

    @property
    def max_bytes(self) -> int:
        return self._index.max_bytes

    def add(self, token_ids: Sequence[int]) -> None:
        """A text has ended. A beginning that is here already, as that of a conversation, is not kept once more."""
        text = np.array(token_ids[-self._capacity // 2 :], dtype=np.int64)
        num_known = self._index.known_length(text)
        if num_known == len(text):
            return
        self._starts.append(self._index.num_added)
        self._index.add([BETWEEN, *text[max(0, num_known - CONTEXT) :].tolist()])
        self._index.forget(self._starts[0])

    def find(self, context: Sequence[int], steps: int, min_length: int) -> Places | None:
        """As ``Suffixes.find``."""
        return self._index.find(context[-CONTEXT:], steps, min_length)
