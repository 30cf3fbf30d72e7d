"""The driver: all requests, drafting, verification and scheduling. An actor without sockets, clock or threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flowspec.config import PipelineConfig
from flowspec.draft.base import DraftSource
from flowspec.draft.lookup import LookupSource
from flowspec.errors import ProtocolError
from flowspec.generation import Generation, LogitsHead, Meter, NoMeter, Request
from flowspec.messages import Alive, Closed, Forget, Hint, Message, Result, Route, Send
from flowspec.schedule.base import Schedule
from flowspec.slot_budget import SlotBudget


@dataclass(frozen=True)
class _Running:
    generation: Generation
    schedule: Schedule


class Driver:
    """Runs requests, each by a schedule of its own; what one has computed of its text is kept for the next.

    ``on_message`` verifies what came back; its commits leave before anything else is done. ``on_idle`` does one
    bounded piece of background work (one segment sent, or one draft pass), so that results never wait long.
    """

    def __init__(
        self,
        head: LogitsHead,
        source: DraftSource | None,
        pipeline_config: PipelineConfig,
        max_positions: int,
        clock: Callable[[], float],
        meter: Meter | None = None,
        num_slots: int | None = None,
        keeps_caches: bool = False,
    ) -> None:
        """``num_slots``: rows that the caches of a worker have room for; ``None``: nobody counts."""
        self._head = head
        self._source = source
        self._pipeline_config = pipeline_config
        self._max_positions = max_positions
        self._clock = clock
        self._meter = meter or NoMeter()
        self._running: dict[int, _Running] = {}  # until the pipeline has confirmed their end
        self._keeps_caches = keeps_caches
        self.budget = SlotBudget(num_slots)

    @property
    def num_open(self) -> int:
        """Requests of which something may still be in the pipeline."""
        return len(self._running)

    def num_slots(self, num_prompt: int, max_tokens: int, tree_size: int) -> int:
        """How many a request may need: all its tokens, and its tree twice, since the dead leave with a delay."""
        return min(num_prompt + max_tokens, self._max_positions) + 2 * tree_size

    def _charge(self, request: Request, schedule: Schedule) -> int:
        """Nobody is charged for more than there is: segments that have got cheap make larger trees."""
        num_slots = self.num_slots(len(request.prompt_ids), request.params.max_tokens, schedule.tree.size)
        return num_slots if self.budget.num_slots is None else min(num_slots, self.budget.num_slots)

    def has_room(self, request: Request, schedule: Schedule) -> bool:
        """Whether the request may start now."""
        return self.budget.has_room(self._charge(request, schedule))

    def submit(self, request: Request, schedule: Schedule) -> tuple[Generation, list[Send]]:
        """Start a request by a schedule made for it, when the budget has room for it; ids only grow.

        The caller reads the generation's output as it comes.
        """
        assert request.request_id not in self._running, "request ids are never reused"
        source = self._source if schedule.uses_draft else None
        if source is not None and schedule.wants_ngrams:
            source = LookupSource(source)
        num_slots, needs_features = self._charge(request, schedule), source is not None and source.needs_features
        heritage, gone = self.budget.take(request.request_id, num_slots, request.prompt_ids, needs_features)
        generation = Generation(
            request,
            self._head,
            source,
            schedule.tree,
            self._pipeline_config,
            self._max_positions,
            self._meter,
            self._clock,
            schedule.wants_hints,
            heritage,
            num_slots,
        )
        generation.keeps_cache = self._keeps_caches
        self._running[request.request_id] = _Running(generation, schedule)
        self._count_sharing()
        generation.prefill()
        return generation, [*_forget(gone), *generation.take_outbox()]

    def cancel(self, generation: Generation) -> list[Send]:
        """Give a request up; what is in flight dies where it is."""
        generation.finish("stop")
        return self._sends_of(generation)

    def on_message(self, message: Message) -> list[Send]:
        match message:
            case Result():
                running = self._running.get(message.request_id)
                if running is None or running.generation.is_finished or running.generation.epoch != message.epoch:
                    return []
                running.schedule.on_result(running.generation, message)
                return self._sends_of(running.generation)
            case Hint():
                running = self._running.get(message.request_id)
                if running is not None and running.generation.epoch == message.epoch:
                    running.generation.take_hint(message)
                return []
            case Closed():
                self._running.pop(message.request_id, None)
                return []
            case Alive():
                return []
            case _:
                raise ProtocolError(f"the driver takes no {type(message).__name__} during a session")

    @property
    def wake_s(self) -> float:
        """When ``on_idle`` may have work again even if no message comes; on the driver's clock, infinite for never."""
        wakes = (running.generation.wake_s for running in self._running.values() if not running.generation.is_finished)
        return min((wake_s for wake_s in wakes if wake_s is not None), default=math.inf)

    def on_idle(self) -> list[Send] | None:
        """One piece of work for the first request that has any, in turn; ``None`` when none has.

        Requests whose root waits come first: no guess is as sure to be of use.
        """
        running = [running for running in self._running.values() if not running.generation.is_finished]
        for candidate in sorted(running, key=lambda running: bool(running.generation.tree.sent[0])):
            generation = candidate.generation
            if candidate.schedule.on_idle(generation):
                request_id = generation.request.request_id
                self._running[request_id] = self._running.pop(request_id)  # to the end of the line
                return self._sends_of(generation)
        return None

    def _sends_of(self, generation: Generation) -> list[Send]:
        sends = generation.take_outbox()
        request_id = generation.request.request_id
        if generation.is_finished and self.budget.is_held(request_id):
            left = generation.leave() if generation.keeps_cache else None
            sends += _forget(self.budget.end(request_id, left))
            self._count_sharing()
        return sends

    def _count_sharing(self) -> None:
        running = [running.generation for running in self._running.values() if not running.generation.is_finished]
        for generation in running:
            generation.num_sharing = len(running)


def _forget(request_ids: list[int]) -> list[Send]:
    return [Send(Route.NEXT, Forget(request_id)) for request_id in request_ids]
