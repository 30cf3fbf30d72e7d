"""The continuous pipeline: FlowSpec (arXiv 2507.02620) without its barrier and without restarts from empty.

1. Score-based step-wise verification: every segment holds the best unsent nodes by cumulative score, of any depth; each
   result is verified as it comes.
2. Draft management: a commit re-roots the tree and tells all workers at once, on their own connections; nobody waits
   for it. What it killed is dropped wherever it is: queued, unsent, or in the caches.
3. Dynamic expansion: after a commit the draft reads the verified features, refreshes the surviving tree best first,
   one pass at a time, and merges what it finds. When nothing was verified meanwhile and nothing is left to send, it
   deepens the tree instead, so that the pipeline does not run dry.
"""

from __future__ import annotations

from flowspec.config import PipelineConfig, TreeConfig
from flowspec.generation import Generation
from flowspec.messages import Result


class Flow:
    name = "flow"
    uses_draft = True

    def __init__(self, tree: TreeConfig, pipeline: PipelineConfig, num_parallel: int) -> None:
        """``num_parallel``: stages that run at the same time; fewer than all where they share one machine's cores."""
        self._tree = tree
        self._segment_len = pipeline.segment_len
        self._max_in_flight = pipeline.segments_in_flight or num_parallel + 1

    def on_result(self, generation: Generation, result: Result) -> None:
        generation.receive(result)
        if verdict := generation.verify():
            generation.commit(verdict)

    def on_idle(self, generation: Generation) -> bool:
        has_room = len(generation.in_flight) < self._max_in_flight
        if has_room and generation.num_passes >= self._passes_wanted(generation) and self._send_best(generation):
            return True
        if generation.propose(self._tree.depth):
            return True
        return has_room and (self._send_best(generation) or generation.propose(self._tree.max_depth))

    def _passes_wanted(self, generation: Generation) -> int:
        """Draft passes since the last commit that the next segment waits for, unless there are none to make.

        A root that the draft missed takes its first guesses along; else the refreshed scores are worth one pass.
        """
        return self._tree.refresh_passes if generation.tree.sent[0] else self._tree.root_passes

    def _send_best(self, generation: Generation) -> bool:
        rows = generation.tree.best_unsent(self._segment_len)
        if not len(rows):
            return False
        generation.send(rows)
        return True
