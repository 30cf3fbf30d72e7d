"""EAGLE-2 (arXiv 2406.16858) over a pipeline as it is: the whole tree goes once through all stages, then verification.

``Chunked`` is the same with the tree cut into equal chunks that follow each other through the stages (the baseline
Chunk-PP of FlowSpec, arXiv 2507.02620): nothing is verified, pruned or drafted until all of them are back.
"""

from __future__ import annotations

import numpy as np

from flowspec.config import TreeConfig
from flowspec.request.generation import Generation
from flowspec.schedule.base import AT_ONCE, NEVER
from flowspec.tree import Ints
from flowspec.wire.messages import Result


def cut(rows: Ints, num_parts: int) -> list[Ints]:
    """Parts of equal length, or one row longer; FlowSpec's code has the longer ones last."""
    length, num_longer = divmod(len(rows), num_parts)
    if not length:
        return np.array_split(rows, num_parts)  # the empty ones last
    lengths = [length] * (num_parts - num_longer) + [length + 1] * num_longer
    return np.split(rows, np.cumsum(lengths[:-1]))


class Serial:
    name = "serial"
    uses_draft = True
    wants_hints = False
    wants_ngrams = False
    awaits_passes = True

    def __init__(self, tree: TreeConfig, num_chunks: int = 1) -> None:
        self.tree_config = tree
        self._num_chunks = num_chunks

    def on_result(self, generation: Generation, result: Result) -> None:
        generation.receive(result)
        if not generation.in_flight and (verdict := generation.verify()):
            generation.commit(verdict)

    def on_idle(self, generation: Generation) -> float:
        """One pass for each level of the tree, then its best nodes."""
        if generation.is_drafting or generation.tree.sent[0]:
            return NEVER
        level = generation.num_passes
        if level < self.tree_config.depth and generation.propose_level(level, self.tree_config.width):
            return AT_ONCE
        for rows in cut(generation.tree.best(), self._num_chunks):
            if len(rows):
                generation.send(np.sort(rows))
        generation.tree.drop_unsent()
        return AT_ONCE


class Chunked(Serial):
    name = "chunked"

    def __init__(self, tree: TreeConfig, num_stages: int, num_chunks: int = 0) -> None:
        """``num_chunks``: 0 for as many as are published, one more than stages."""
        super().__init__(tree, num_chunks or num_stages + 1)
