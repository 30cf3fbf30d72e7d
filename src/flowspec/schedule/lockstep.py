"""FlowSpec as published (arXiv 2507.02620), with its barrier in every step. ``flow`` is ours, without.

1. Score-based step-wise verification: the tree's nodes enter in the order of their cumulative score, cut into equal
   segments; each step verifies one.
2. Draft management: what a verification rules out is pruned at every stage before the stage's next forward.
3. Dynamic expansion: after a verification the draft makes a new tree from the new root, with true features, as if
   nothing were under way; those of its best nodes that are not in flight follow as one segment, however long. When
   nothing was verified an empty segment follows, or, with ``deepen``, the tree grows by one level.

Each mechanism has a switch, for ablations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flowspec.config import LockstepConfig
from flowspec.request.generation import Generation
from flowspec.schedule.serial import cut
from flowspec.schedule.stepped import Stepped
from flowspec.tree import Ints


class Lockstep(Stepped):
    def __init__(self, config: LockstepConfig, num_stages: int) -> None:
        super().__init__(config.tree, num_stages, config.prune)
        self.name = config.name
        self._config = config

    def first_segments(self, generation: Generation) -> Iterator[Ints]:
        self._draft(generation, self.tree_config.depth)
        tree = generation.tree
        rows = tree.best()
        if not self._config.score_order:
            rows = rows[np.lexsort((rows, tree.depths[rows]))]  # level by level, as other systems send it
        num_segments = self._num_stages + 1
        parts = cut(rows, min(self._config.segments or num_segments, num_segments))
        yield from (np.sort(part) for part in parts)
        yield from [rows[:0]] * (num_segments - len(parts))  # empty ones: a round fills the pipeline

    def next_segment(self, generation: Generation, has_verified: bool) -> Ints:
        tree, config = generation.tree, self._config
        num_best = 0
        if config.expand and has_verified:
            tree.forget_scores()
            self._draft(generation, config.expand_depth)
            num_best = config.expand_size + 1
        elif config.expand and config.deepen:
            num_known = int(tree.sent[tree.best(len(tree))].sum())
            generation.propose(self.tree_config.max_depth, self.tree_config.width)
            num_best = num_known + config.deepen_size
        best = tree.best(num_best)
        return np.sort(best[~tree.sent[best]])

    def _draft(self, generation: Generation, depth: int) -> None:
        """A whole EAGLE-2 tree from the root: a pass for each level."""
        for level in range(depth):
            if not generation.propose_level(level, self.tree_config.width):
                return
