"""PipeDec (arXiv 2504.04104): one level of the tree enters the pipeline in each step, one token at most leaves it.

The levels follow each other through the stages: ``width`` children of every node, the best ``width`` of them all.
When a level comes back its token is verified and what does not descend from it is pruned. The draft goes on from the
deepest level and never looks back: within a round its features are never refreshed from verified ones (so the baseline
in FlowSpec's public code).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from flowspec.config import TreeConfig
from flowspec.request.generation import Generation
from flowspec.schedule.stepped import Stepped
from flowspec.tree import Ints


class PipeDec(Stepped):
    name = "pipedec"

    def __init__(self, tree: TreeConfig, num_stages: int, width: int) -> None:
        super().__init__(replace(tree, top_k=width, size=width * width), num_stages)
        self._width = width

    def first_segments(self, generation: Generation) -> Iterator[Ints]:
        yield np.zeros(1, dtype=np.int64)
        for _ in range(self._num_stages):
            yield self.next_segment(generation, has_verified=False)

    def next_segment(self, generation: Generation, has_verified: bool) -> Ints:
        """Draft the level below the deepest that was sent, from its nodes that are still alive."""
        tree = generation.tree
        level = int(tree.depths[tree.sent].max())
        if level >= generation.block_depth:  # a new block has to guess the levels under way, too
            for above in range(level):
                generation.propose_level(above, self._width)
                tree.drop_unsent()
        generation.propose_level(level, self._width)
        rows = tree.best_at(level + 1, self._width)
        return rows[~tree.sent[rows]]
