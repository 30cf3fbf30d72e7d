"""``flow`` while it pays: measured as it runs, with a smaller tree or none where plain decoding would be faster.

Plain decoding takes one round trip for each token, and the driver sees how long a round trip takes at best. As long as
``flow`` is faster than that, nothing else is tried. Otherwise each rung of the ladder (the whole tree, a small one,
none) runs for some tokens, the fastest stays, and after a while, longer each time, all are tried again. The tokens are
the same on every rung.
"""

from __future__ import annotations

import math
from dataclasses import replace

from flowspec.config import FlowParts, PipelineConfig, TreeConfig
from flowspec.draft.base import Levels
from flowspec.request.generation import Generation
from flowspec.schedule.autoregressive import Autoregressive
from flowspec.schedule.flow import Flow
from flowspec.schedule.pace import FixedPace, Pace
from flowspec.wire.messages import Result

WINDOW = 24  # tokens that a rung is measured over
FIRST_PATIENCE, LAST_PATIENCE = 256, 8192  # tokens until all rungs are tried again
SMALL = 4  # times fewer nodes in a small tree
FULL = 0  # the first rung


class Experience:
    """What the requests of one driver have found out, since they meet the same devices and the same draft."""

    def __init__(self) -> None:
        self.rung = FULL
        self.patience = FIRST_PATIENCE
        self.num_left = 0  # tokens until all rungs are tried again

    def settle(self, rung: int) -> None:
        is_same = rung == self.rung and rung != FULL
        self.patience = min(self.patience * 2, LAST_PATIENCE) if is_same else FIRST_PATIENCE
        self.rung, self.num_left = rung, self.patience


class Auto:
    name = "auto"
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
        experience: Experience,
    ) -> None:
        """``experience`` is shared; the rest as in ``Flow``."""
        small_tree = replace(
            tree,
            size=max(2, tree.size // SMALL),
            width=max(1, tree.width // SMALL),
            min_probability=min(0.5, tree.min_probability * SMALL),
        )
        full, small = (Flow(t, parts, pipeline, num_parallel, pace, levels) for t in (tree, small_tree))
        self._rungs = (full, small, Autoregressive(tree))
        self.tree_config = full.tree_config
        self.wants_hints, self.wants_ngrams = full.wants_hints, full.wants_ngrams
        self._experience = experience
        self._rung = experience.rung
        self._round_trip_s = math.inf  # the shortest
        self._window: tuple[float, int] | None = None  # when the rung's measuring began, and with how many tokens
        self._rates: list[float] = []  # tokens/s of the rungs from the first on, while they are tried

    def on_result(self, generation: Generation, result: Result) -> None:
        sent_s = generation.sent_s(result.segment_id)
        if sent_s is not None:
            self._round_trip_s = min(self._round_trip_s, generation.clock() - sent_s)
        self._rungs[self._rung].on_result(generation, result)
        self._measure(generation)

    def on_idle(self, generation: Generation) -> float:
        if generation.tree.size != self._rungs[self._rung].tree_config.size:
            self._step_to(self._rung, generation)
        return self._rungs[self._rung].on_idle(generation)

    def _measure(self, generation: Generation) -> None:
        now, num_tokens = generation.clock(), len(generation.output_ids)
        if self._window is None:
            if num_tokens:
                self._window = (now, num_tokens)
            return
        start_s, num_before = self._window
        if num_tokens - num_before < WINDOW or now <= start_s:
            return
        self._window = (now, num_tokens)
        self._decide((num_tokens - num_before) / (now - start_s), num_tokens - num_before, generation)

    def _decide(self, rate: float, num_tokens: int, generation: Generation) -> None:
        if self._rates or (self._rung == FULL and rate * self._round_trip_s < 1):
            self._rates.append(rate)
            if len(self._rates) < len(self._rungs):
                self._step_to(len(self._rates), generation)
                return
            best = self._rates.index(max(self._rates))
            self._rates = []
            self._experience.settle(best)
            self._step_to(best, generation)
        elif self._rung != FULL:
            self._experience.num_left -= num_tokens
            if self._experience.num_left <= 0:
                self._step_to(FULL, generation)

    def _step_to(self, rung: int, generation: Generation) -> None:
        self._rung = rung
        generation.resize_tree(self._rungs[rung].tree_config)
