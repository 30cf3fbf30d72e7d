"""Chains of guesses in a draft tree."""

from __future__ import annotations

import numpy as np

from flowspec.tree import DraftTree


def add_path(tree: DraftTree, row: int, token_ids: list[int], logprobs: list[float]) -> None:
    """Below ``row``, one below the other."""
    tree.graft(row, np.array(token_ids, dtype=np.int64), np.arange(len(token_ids)) - 1, np.array(logprobs))
