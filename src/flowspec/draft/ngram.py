"""Drafts by looking back: what followed the last tokens when they occurred before, in the prompt or in the output.

Known as prompt lookup decoding; free of weights, and good on text that repeats itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowspec.draft.base import Accepted
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints


@dataclass(frozen=True)
class NgramConfig:
    """How far back and ahead an n-gram draft looks."""

    min_match: int = 2  # tokens that must match at least
    max_match: int = 8  # tokens that are compared at most
    num_tokens: int = 10  # tokens proposed after one match


class NgramSource:
    """Longest-suffix match over prompt and output."""

    name = "ngram"
    steady_steps = 1
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(self, config: NgramConfig | None = None) -> None:
        self.config = config or NgramConfig()

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> NgramDraft:
        """A match has one continuation, however many children are wanted."""
        return NgramDraft(self.config, prompt_ids)


class NgramDraft:
    """One request's text with an index of its n-grams: the tuple -> where its latest occurrence ends."""

    def __init__(self, config: NgramConfig, prompt_ids: Sequence[int]) -> None:
        self._config = config
        self._text: list[int] = []  # the prefix; the root is the tree's
        self._ends: dict[tuple[int, ...], int] = {}
        self._append(prompt_ids[:-1])

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """Nothing to learn: the prompt was read when the draft was opened."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._append(accepted.token_ids)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """Continue each node by one chain: what followed the longest match of its own path."""
        tree.staleness[rows] = 0  # there is nothing fresher to learn about them
        for node_id in tree.node_ids[rows].tolist():
            found = tree.rows_of(np.array([node_id]))  # a chain may have moved the rows
            if not len(found):
                continue  # or the tree has forgotten this one for better nodes
            row = int(found[0])
            match_len, tokens = self.look_up(tree.token_ids[tree.path(row)].tolist())
            if tokens:
                # Longer matches are surer; the share is a rule of thumb, and only the order of nodes hangs on it.
                tree.add_path(row, tokens, [math.log(match_len / (match_len + 1))] * len(tokens))
        return True

    def _append(self, token_ids: Sequence[int]) -> None:
        """Index every n-gram that now has a token after it."""
        for token_id in token_ids:
            end = len(self._text)
            for length in range(self._config.min_match, min(self._config.max_match, end) + 1):
                self._ends[tuple(self._text[end - length : end])] = end
            self._text.append(token_id)

    def look_up(self, path: list[int]) -> tuple[int, list[int]]:
        """The longest match of the text's end with ``path`` behind it, and the tokens that followed it."""
        longest = self._config.max_match
        context = (self._text[-longest:] + path)[-longest:]
        for length in range(min(longest, len(context)), self._config.min_match - 1, -1):
            end = self._ends.get(tuple(context[-length:]))
            if end is not None:
                return length, (self._text + path)[end : end + self._config.num_tokens]
        return 0, []
