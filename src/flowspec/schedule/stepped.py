"""Moving in lock-step: what ``lockstep`` and ``pipedec`` have in common. In each step of the whole pipeline

1. the driver receives the oldest segment and verifies it;
2. it tells every worker what was pruned, and that the step begins: the barrier;
3. every worker runs the segment that it holds and passes it on, while the driver drafts and sends the next one.

A round begins with as many segments as fill the pipeline, driver included, which need no barrier; so segment j of a
round meets step ``j + k - num_stages`` at worker k. A segment may be empty, but one enters and one leaves in each step.
When the target's token is not in the tree the round ends: what is in flight is dead, and the next one starts from an
empty pipeline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

from flowspec.config import TreeConfig
from flowspec.request.generation import Generation
from flowspec.schedule.base import AT_ONCE, NEVER
from flowspec.tree import Ints
from flowspec.wire.messages import Result


class Stepped(ABC):
    name: str
    uses_draft = True
    wants_hints = False
    wants_ngrams = False
    awaits_passes = False  # a step takes several

    def __init__(self, tree: TreeConfig, num_stages: int, prunes: bool = True) -> None:
        """``prunes``: tell the workers of each commit at once, and not only at the end of the round."""
        self.tree_config = tree
        self._num_stages = num_stages
        self._prunes = prunes
        self._results: deque[Result] = deque()  # the driver reads one a step, when its own part of the last is done
        self._step = 0
        self._first_id: int | None = None  # the first segment of this round; None until the first round
        self._next_gate = 0
        self._fill: Iterator[Ints] | None = None  # while a round begins
        self._must_send: bool = False  # the driver's part of this step is not done
        self._has_verified = False  # in this step

    @abstractmethod
    def first_segments(self, generation: Generation) -> Iterator[Ints]:
        """A round begins with an unsent root: draft, and yield the segments that fill the pipeline, in order."""

    @abstractmethod
    def next_segment(self, generation: Generation, has_verified: bool) -> Ints:
        """Draft, and return the rows to send in this step; none is an empty segment."""

    def on_result(self, generation: Generation, result: Result) -> None:
        self._results.append(result)

    def on_idle(self, generation: Generation) -> float:
        if not generation.tree.sent[0] and self._fill is None:
            self._begin_round(generation)
        if self._fill is not None:
            rows = next(self._fill, None)
            if rows is not None:
                self._send(generation, rows)
                return AT_ONCE
            self._fill = None
        if self._must_send:
            self._must_send = False
            self._send(generation, self.next_segment(generation, self._has_verified))
        elif self._results:
            self._receive(generation, self._results.popleft())
        else:
            return NEVER
        return AT_ONCE

    def _begin_round(self, generation: Generation) -> None:
        self._fill = self.first_segments(generation)
        self._first_id = generation.outbox.next_segment_id
        self._next_gate = self._step + 1 - self._num_stages

    def _send(self, generation: Generation, rows: Ints) -> None:
        generation.send(rows, gate=self._next_gate)
        self._next_gate += 1

    def _receive(self, generation: Generation, result: Result) -> None:
        """Steps 1 and 2."""
        if self._first_id is not None and result.segment_id < self._first_id:
            return  # an empty segment of a round that is over
        generation.tree.drop_unsent()  # what was not sent is not in the published tree
        generation.receive(result)
        verdict = generation.verify()
        misses = verdict is not None and verdict.new_root is None
        if verdict is not None:
            generation.commit(verdict, announce=self._prunes or misses)
        if generation.is_finished or self._first_id is None:
            return  # the prompt came back before the first round
        self._must_send = not misses
        self._has_verified = verdict is not None
        # A round that is over waits for nothing: its last segment passes worker N at the gate below.
        self._step = self._next_gate + self._num_stages if misses else self._step + 1
        generation.step(self._step)
