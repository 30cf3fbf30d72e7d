"""The driver: all requests, drafting, verification and scheduling. An actor without sockets, clock or threads."""

from __future__ import annotations

from dataclasses import dataclass

from flowspec.config import EngineConfig
from flowspec.core import FINAL, Ending
from flowspec.draft.base import DraftSource
from flowspec.draft.lookup import LookupSource
from flowspec.draft.memory import Memory
from flowspec.errors import ProtocolError, RequestError, UsageError
from flowspec.request.generation import Generation
from flowspec.request.request import Common, Request
from flowspec.request.slot_budget import SlotBudget, slots_needed
from flowspec.schedule.base import AT_ONCE, NEVER, Schedule
from flowspec.wire.actor import Route, Send
from flowspec.wire.messages import Alive, Broken, Closed, Failed, Forget, Hint, Message, Result

MIN_GROWTH, GROWTH_SHARE = 256, 0.25  # slots by which a request's share grows, and of what it holds: the larger one


@dataclass
class _Running:
    generation: Generation
    schedule: Schedule
    wake_s: float = AT_ONCE  # when the schedule wants to be asked, if no message comes before


class Driver:
    """Runs requests, each by a schedule of its own; what one has computed of its text is kept for the next.

    ``on_message`` verifies what came back; its commits leave before anything else is done. ``on_idle`` does one
    bounded piece of background work (one segment sent, or one draft pass), so that results never wait long.

    A request takes slots of the workers' caches as it grows. Where there are no more, the youngest one is preempted: it
    gives its caches up and is started again later, by whoever submitted it, behind what it has emitted. The oldest one
    always goes on. An exception in one request's work ends that request alone; its generation has the ``error``.
    """

    def __init__(
        self,
        common: Common,
        source: DraftSource | None,
        num_slots: int | None = None,
        likely_tokens: int = EngineConfig.likely_tokens,
        num_stages: int = 1,
        tapped: tuple[int, ...] = (),
        memory: Memory | None = None,
    ) -> None:
        """``num_slots``: rows that the caches of a worker have room for; ``None``: nobody counts.

        ``likely_tokens``: of an answer, that a request has room for when it starts.
        ``tapped``: the target's layers whose features the workers add up. ``memory``: is told the text of each request
        that ends.
        """
        if source is not None and source.feature_layers not in ((), (FINAL,), tapped):
            raise UsageError(
                f"draft {source.name} reads the layers {list(source.feature_layers)}, and these workers give it none "
                "of them; use another draft here"
            )
        self._common = common
        self._source = source
        self._memory = memory
        self._running: dict[int, _Running] = {}  # until the pipeline has confirmed their end
        self._likely_tokens = likely_tokens
        self._unwanted: list[int] = []  # cache entries of which the workers have not been told that they go
        self.use(num_slots, num_stages)

    @property
    def num_open(self) -> int:
        """Requests of which something may still be in the pipeline."""
        return len(self._running)

    def most_slots(self, num_prompt: int, max_tokens: int, tree_size: int) -> int:
        """How many a request may ever need."""
        return slots_needed(min(num_prompt + max_tokens, self._common.max_positions), tree_size)

    def _charge(self, request: Request, schedule: Schedule, num_emitted: int) -> int:
        """What a request holds when it starts, or starts again.

        Nobody is charged for more than there is: segments that have got cheap make larger trees.
        """
        num_prompt, max_tokens, tree_size = (
            len(request.prompt_ids),
            request.params.max_tokens,
            schedule.tree_config.size,
        )
        if self.budget.num_slots is None:
            return self.most_slots(num_prompt, max_tokens, tree_size)
        likely = self.most_slots(num_prompt, min(max_tokens, num_emitted + self._likely_tokens), tree_size)
        return min(likely, self.budget.num_slots)

    def has_room(self, request: Request, schedule: Schedule, num_emitted: int = 0) -> bool:
        """Whether the request, which has emitted so many tokens already, may start now."""
        return self.budget.has_room(self._charge(request, schedule, num_emitted))

    def submit(
        self, request: Request, schedule: Schedule, previous: Generation | None = None
    ) -> tuple[Generation, list[Send]]:
        """Start a request by a schedule made for it, when the budget has room for it; ids only grow.

        ``previous``: the request's generation that was preempted. The caller reads the new one's output as it comes.
        """
        request_id, prompt_ids = request.request_id, request.prompt_ids
        assert previous is not None or request_id not in self._running, "request ids are never reused"
        num_emitted = 0 if previous is None else len(previous.output_ids)
        text_ids = prompt_ids if previous is None else (*prompt_ids, *previous.output_ids)
        source = self._source if schedule.uses_draft else None
        if source is not None and schedule.wants_ngrams:
            source = LookupSource(source, self._memory)
        num_slots = self._charge(request, schedule, num_emitted)
        needs_features = source is not None and bool(source.feature_layers)
        cached, gone = self.budget.take(request_id, num_slots, text_ids, needs_features)
        try:
            generation = Generation(
                request, self._common, source, schedule.tree_config, schedule.wants_hints, cached, num_slots, previous
            )
            if schedule.awaits_passes:
                generation.draft_apart()
            generation.prefill(self._max_chunks)
        except BaseException:
            self.budget.end(request_id, None)
            self._unwanted += [*gone, *([] if cached.request_id is None else [cached.request_id])]
            raise
        self._running[request_id] = _Running(generation, schedule)
        self._count_sharing()
        return generation, [*self._forget(gone), *generation.take_outbox()]

    def cancel(self, generation: Generation) -> list[Send]:
        """Give a request up; what is in flight dies where it is."""
        generation.cancel()
        return self._sends_of(generation)

    def interrupt(self) -> None:
        """The workers are gone, with all that they held: every running request is preempted, and nobody is told."""
        for generation in self._generations():
            generation.preempt()
        self._running.clear()
        self._unwanted.clear()
        self.budget = SlotBudget(self.budget.num_slots)

    def use(self, num_slots: int | None, num_stages: int) -> None:
        """These workers are there from now on, with room for so many rows."""
        assert not self._running, "interrupt it first"
        self._max_chunks = self._common.pipeline.prefill_in_flight or num_stages + 1
        self.budget = SlotBudget(num_slots)

    def use_source(self, source: DraftSource) -> None:
        """Requests that come from now on draft with it."""
        self._source = source

    def on_message(self, message: Message) -> list[Send]:
        match message:
            case Result() | Hint() | Broken() | Failed():
                running = self._running.get(message.request_id)
                if running is None or running.generation.is_finished or running.generation.epoch != message.epoch:
                    return []
                try:
                    self._take(running, message)
                except Exception as error:
                    running.generation.fail(error)
                return self._sends_of(running.generation)
            case Closed():
                running = self._running.get(message.request_id)
                if running is not None and running.generation.epoch == message.epoch:
                    del self._running[message.request_id]
                return []
            case Alive():
                return []
            case _:
                raise ProtocolError(f"the driver takes no {type(message).__name__} during a session")

    def _take(self, running: _Running, message: Result | Hint | Broken | Failed) -> None:
        generation = running.generation
        match message:
            case Result():
                if message.num_prefix:
                    generation.prompt_came_back()
                running.schedule.on_result(generation, message)
            case Hint():
                generation.take_hint(message)
            case Broken():
                generation.note_broken(message)
            case Failed():
                raise RequestError(f"worker {message.stage} cannot go on with this request: {message.text}")

    @property
    def wake_s(self) -> float:
        """When ``on_idle`` may have work again even if no message comes; on the driver's clock, infinite for never."""
        running = (running for running in self._running.values() if not running.generation.is_finished)
        return min((r.wake_s for r in running if r.wake_s != AT_ONCE), default=NEVER)

    def on_idle(self) -> list[Send] | None:
        """One piece of work for the first request that has any, in turn; ``None`` when none has.

        Requests whose root waits come first: no guess is as sure to be of use.
        """
        ready = [running for running in self._running.values() if _may_work(running.generation)]
        for candidate in sorted(ready, key=lambda running: bool(running.generation.tree.sent[0])):
            generation = candidate.generation
            try:
                candidate.wake_s = candidate.schedule.on_idle(generation)
            except Exception as error:
                generation.fail(error)
                candidate.wake_s = AT_ONCE
            if candidate.wake_s == AT_ONCE:
                request_id = generation.request.request_id
                self._running[request_id] = self._running.pop(request_id)  # to the end of the line
                return self._sends_of(generation)
        return None

    def _sends_of(self, generation: Generation) -> list[Send]:
        sends = generation.take_outbox()
        num_held = self.budget.held_by(generation.request.request_id)
        if generation.is_finished and num_held:
            sends += self._release(generation)
        elif self.budget.num_slots is not None and generation.slots_needed > num_held and not generation.is_finished:
            sends += self._grow(generation)
        return sends

    def _release(self, generation: Generation) -> list[Send]:
        entry = generation.cache_entry() if generation.keeps_cache else None
        if self._memory is not None and generation.ending in (Ending.FINISHED, Ending.CANCELLED):
            self._memory.add((*generation.request.prompt_ids, *generation.output_ids))
        gone = self.budget.end(generation.request.request_id, entry)
        self._count_sharing()
        return self._forget(gone)

    def _grow(self, generation: Generation) -> list[Send]:
        """Let the request hold more before it needs more; where there is no more, the youngest has to give way."""
        budget, request_id = self.budget, generation.request.request_id
        assert budget.num_slots is not None, "nobody counts"
        num_held = budget.held_by(request_id)
        needed = min(generation.slots_needed, budget.num_slots)
        if needed <= num_held:
            return []
        sends: list[Send] = []
        while not budget.can_grow(request_id, needed):
            victim = max(self._generations(), key=lambda running: running.request.request_id)
            victim.preempt()
            sends += [*victim.take_outbox(), *self._release(victim)]
            if victim is generation:
                return sends
        most = min(generation.slots_needed + generation.num_left, budget.num_slots)
        wanted = min(most, num_held + max(MIN_GROWTH, round(GROWTH_SHARE * num_held)))
        num_slots = wanted if wanted > needed and budget.can_grow(request_id, wanted) else needed
        sends += self._forget(budget.grow(request_id, num_slots))
        generation.reserve(num_slots)
        return [*sends, *generation.take_outbox()]

    def _forget(self, request_ids: list[int]) -> list[Send]:
        """Drop these requests' caches at the workers."""
        unwanted, self._unwanted = [*self._unwanted, *request_ids], []
        return [Send(Route.NEXT, Forget(request_id)) for request_id in unwanted]

    def _generations(self) -> list[Generation]:
        """Of requests that have not ended."""
        return [running.generation for running in self._running.values() if not running.generation.is_finished]

    def _count_sharing(self) -> None:
        generations = self._generations()
        for generation in generations:
            generation.num_sharing = len(generations)


def _may_work(generation: Generation) -> bool:
    return not generation.is_finished and generation.is_prompt_sent
