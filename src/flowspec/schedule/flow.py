"""The continuous pipeline: FlowSpec (arXiv 2507.02620) without its barrier and without restarts from empty.

1. Score-based step-wise verification: every segment holds the best unsent nodes by cumulative score, of any depth; each
   result is verified as it comes.
2. Draft management: a commit re-roots the tree and tells all workers at once, on their own connections; nobody waits
   for it. What it killed is dropped wherever it is: queued, unsent, or in the caches.
3. Dynamic expansion: after a commit the draft reads the verified features, refreshes the surviving tree best first,
   one pass at a time, and merges what it finds. When nothing was verified meanwhile and nothing is left to send, it
   deepens the tree instead, so that the pipeline does not run dry. A draft that guesses blocks makes one pass for a new
   root; until it is made, and for a root that nobody foresaw, what the block before says of these levels serves.

Decisions are late: where the cost of a forward is known, a segment is composed when the pipeline is about to be free
for it, and until then the tree gets better.
"""

from __future__ import annotations

from dataclasses import replace

from flowspec.config import FlowParts, PipelineConfig, TreeConfig
from flowspec.draft.base import Levels
from flowspec.request.generation import Generation
from flowspec.schedule.base import AT_ONCE, NEVER
from flowspec.schedule.pace import DEFAULT_SEGMENT_LEN, FixedPace, Pace
from flowspec.tree import UNDRAFTED
from flowspec.wire.messages import Result

PASSES_SHARE = 0.45  # of a segment's time that a new root may wait for draft passes, where both are known
EARLY_PASSES_SHARE = 0.7  # the same where segments are sent as soon as there is room: nothing makes them better later
MOST_NODES = 4.0  # times as many as published in a tree and in a draft pass, where rows are cheap
BLOCK_TOP_K = 16  # children of a node, where they take no pass of their own
SHARED_PATIENCE = 2  # times as long, while other requests keep the pipeline busy


class Flow:
    name = "flow"
    uses_draft = True
    awaits_passes = True

    def __init__(
        self,
        tree: TreeConfig,
        parts: FlowParts,
        pipeline: PipelineConfig,
        num_parallel: int,
        pace: Pace | FixedPace,
        levels: Levels,
    ) -> None:
        """``num_parallel``: stages that run at the same time; fewer than all where they share one machine's cores.

        ``levels``: the draft's; within the steady ones it drafts nothing twice, and needs no feature to go deeper.
        Those of a block are read at once.
        """
        by_costs = pace.segment_len if parts.segment_costs else DEFAULT_SEGMENT_LEN
        knows_costs = isinstance(pace, Pace)
        self._segment_len = pipeline.segment_len or by_costs
        self.wants_hints, self.wants_ngrams = parts.hints, parts.ngrams
        self._steady_steps = levels.steady_steps if parts.steady else 1
        self._block_len = levels.block_len
        self._num_worth = pace.num_worth if parts.segment_costs else len
        self.tree_config = self._size_tree(tree, pace.tree_times if parts.segment_costs else 1.0)
        binds_late = knows_costs and parts.late_binding
        self._passes_share = PASSES_SHARE if binds_late else EARLY_PASSES_SHARE
        self._max_in_flight = pipeline.segments_in_flight or (2 if binds_late else 1) * (num_parallel + 1)
        self._max_shared = pipeline.segments_in_flight or num_parallel + 1  # of all requests, where there are several
        self._pace = pace if parts.late_binding else FixedPace()
        self._pass_s = 0.0  # what the last draft pass took

    def _size_tree(self, tree: TreeConfig, times: float) -> TreeConfig:
        """The less a row costs, the less probable a node may be; nobody has time for thousands.

        A block's guesses cost next to nothing, and hardly get worse with depth: more of them are worth a row.
        """
        share, deepest = min(times, MOST_NODES), max(self._steady_steps, self._block_len)
        if self._block_len > 1:
            tree = replace(tree, top_k=max(tree.top_k, BLOCK_TOP_K), min_probability=tree.min_probability / 2)
        return replace(
            tree,
            size=round(tree.size * share),
            width=round(tree.width * share),
            min_probability=tree.min_probability / times,
            depth=max(tree.depth, deepest),
            max_depth=max(tree.max_depth, deepest),
        )

    # --- 2. draft management: every commit prunes at once, everywhere ---

    def on_result(self, generation: Generation, result: Result) -> None:
        self._pace.note_result(result, generation.sent_s(result.segment_id), generation.clock())
        generation.receive(result)
        if verdict := generation.verify():
            generation.commit(verdict)
            if not generation.in_flight and generation.num_sharing == 1:
                self._pace.note_miss(generation.clock())

    # --- what is done next: the best segment when it is due, and a better tree until then ---

    def on_idle(self, generation: Generation) -> float:
        is_drafting = generation.is_drafting  # elsewhere: what follows would be another pass
        if generation.reread(self.tree_config.depth, self.tree_config.width):
            return AT_ONCE
        due_s, has_room = self._due_s(generation), self._has_room(generation)
        # Else there is time for another pass, or for the one that is under way.
        is_due = generation.clock() + (0.0 if is_drafting else self._pass_s) >= due_s
        if has_room and is_due and self._has_guesses(generation, is_drafting) and self._send_best(generation):
            return AT_ONCE
        if is_drafting:
            return due_s if has_room and not is_due else NEVER
        if self._refresh(generation):
            return AT_ONCE
        if not has_room:
            return NEVER
        if generation.clock() < due_s:
            return AT_ONCE if self._deepen(generation) else due_s
        return AT_ONCE if self._send_best(generation) or self._deepen(generation) else NEVER

    def _due_s(self, generation: Generation) -> float:
        """Where requests share the pipeline, the workers see to it that nobody's only segment waits for long."""
        is_only = generation.num_sharing > 1 and not generation.in_flight
        return AT_ONCE if is_only else self._pace.due_s

    def _has_room(self, generation: Generation) -> bool:
        """Whether another segment may be under way."""
        num_sharing = generation.num_sharing
        most = self._max_in_flight if num_sharing == 1 else max(1, self._max_shared // num_sharing)
        return len(generation.in_flight) < most

    def _has_guesses(self, generation: Generation, is_drafting: bool) -> bool:
        """Whether the draft passes since the last commit are made that the next segment waits for.

        A root that the draft missed takes its first guesses along; else the refreshed scores are worth one pass. What
        follows a root in an older block is good enough to go ahead of the pass.
        """
        if self._block_len > 1 and generation.tree.staleness[0] != UNDRAFTED:
            return True
        root_is_sent = bool(generation.tree.sent[0])
        wanted = self.tree_config.refresh_passes if root_is_sent else self.tree_config.root_passes
        if self._pace.slot_s and self._pass_s:
            patience = self._passes_share * (SHARED_PATIENCE if generation.num_sharing > 1 else 1)
            affordable = round(patience * self._pace.slot_s / self._pass_s)
            wanted = max(1, min(affordable - root_is_sent, self.tree_config.depth))
        return max(0, generation.num_passes - is_drafting) >= wanted

    # --- 1. score-based step-wise verification: the best unsent nodes, of any depth ---

    def _send_best(self, generation: Generation) -> bool:
        rows = generation.tree.best_unsent(self._segment_len, self._num_worth)
        if not len(rows):
            return False
        self._pace.note_sent(len(rows), generation.clock())
        generation.send(rows)
        return True

    # --- 3. dynamic expansion: one draft pass at a time ---

    def _refresh(self, generation: Generation) -> bool:
        """Over what the newest verified features have changed."""
        return self._propose(generation, self.tree_config.depth)

    def _deepen(self, generation: Generation) -> bool:
        """Beyond that: nothing was verified meanwhile, and there is time."""
        return self._propose(generation, self.tree_config.max_depth)

    def _propose(self, generation: Generation, depth: int) -> bool:
        start_s = generation.clock()
        if not generation.propose(depth, self.tree_config.width, self._steady_steps):
            return False
        self._pass_s = max(generation.clock() - start_s, generation.apart_s)
        return True
