"""What the dashboard shows: measured on the engine's thread, told in the event loop. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from flowspec import __version__
from flowspec.request.generation import Generation
from flowspec.request.meter import Work
from flowspec.server.driver_meter import DriverMeter
from flowspec.server.service import Service, Ticket
from flowspec.server.timeline import DRIVER_PLACE, Emission, Forwards, Timeline
from flowspec.server.tree_view import TreeWatch
from flowspec.wire.messages import Result

Json: TypeAlias = dict[str, Any]

EVENT_S = 0.25
FIRST_EVENT_S = 0.1  # in which a tree may turn up
FIRST_SPANS_S = 2.0  # that a new connection is told of
RATE_S = 5.0  # that rates are taken over
BUSY_S = 2.0  # that busy shares are taken over
MAX_REQUESTS = 20


@dataclass(frozen=True)
class RequestFigures:
    """A line in the list of requests; outlives its ticket."""

    request_id: int | None  # of the engine
    name: str
    state: str
    start_s: float
    num_prompt: int
    num_tokens: int
    tokens_per_s: float
    mean_accepted: float

    @classmethod
    def of(cls, ticket: Ticket) -> RequestFigures:
        return cls(
            ticket.job.request.request_id if ticket.job is not None else None,
            ticket.name,
            ticket.state,
            ticket.start_s,
            len(ticket.prompt_ids),
            ticket.num_tokens,
            ticket.tokens_per_s,
            ticket.stats.mean_accepted if ticket.stats is not None else 0.0,
        )

    def json(self) -> Json:
        return {
            "id": self.name,
            "state": self.state,
            "prompt_tokens": self.num_prompt,
            "tokens": self.num_tokens,
            "tokens_per_s": self.tokens_per_s,
            "mean_accepted": self.mean_accepted,
        }


class Feed:
    """The engine's ``Meter``, an ``Observer`` of its service, and what every open page is told of both.

    Give it to the engine as ``meter``, then call ``watch`` before the service starts. What happens is only noted, in
    bounded memory; as long as no page is open nobody reads the notes.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        """``names``: of the stages' devices."""
        self._names = names
        self._timeline = Timeline()
        self._trees = TreeWatch()
        # Written on the engine's thread:
        self._driver = DriverMeter(self._timeline)
        self._counted: dict[str, tuple[int, int]] = {}  # accepted and verified so far, by running request
        self._ended: deque[RequestFigures] = deque(maxlen=MAX_REQUESTS)
        # The event loop's:
        self._watched: dict[object, int] = {}  # the request whose tree each page shows
        self._busy: deque[tuple[float, dict[int, float]]] = deque()  # time, and seconds of work by place until then

    def watch(self, service: Service, model: str | None = None) -> None:
        """``model``: what clients call it; by default its directory's name."""
        self._service = service
        self._model = model or service.engine.checkpoint.title
        service.observers.append(self)
        service.engine.result_hook = self._on_result
        self._text = service.engine.vocabulary.token_text

    # --- on the engine's thread ---

    def work(self, kind: Work, num_rows: int) -> AbstractContextManager[None]:
        return self._driver.work(kind, num_rows)

    def _on_result(self, generation: Generation, result: Result) -> None:
        self._driver.on_result(generation, result.segment_id)
        stats = generation.stats.by_segment.get(result.segment_id)
        self._timeline.inbox.append(Forwards(result.request_id, result.segment_id, tuple(result.timings), stats))
        self._trees.look(generation, time.perf_counter())

    def on_tokens(self, ticket: Ticket, num_new: int, interval_s: float | None) -> None:
        if (stats := ticket.stats) is None:
            return
        accepted, verified = self._counted.get(ticket.name, (0, 0))
        self._counted[ticket.name] = stats.accepted, stats.verified
        emission = Emission(ticket.last_s, num_new, stats.accepted - accepted, stats.verified - verified)
        self._timeline.inbox.append(emission)

    def on_end(self, ticket: Ticket) -> None:
        self._counted.pop(ticket.name, None)
        self._driver.forget()
        self._ended.append(RequestFigures.of(ticket))

    # --- in the event loop ---

    def state(self) -> Json:
        """What does not change while the server runs, but for the stages' state."""
        engine = self._service.engine
        ready = {ready.stage: ready for ready in engine.ready}
        stages: list[Json] = []
        for stage, layers in enumerate(engine.partition.stages, start=1):
            known = ready.get(stage)
            stages.append(
                {
                    "stage": stage,
                    "device": self._names[stage - 1] if self._names else f"worker {stage}",
                    "address": engine.addresses[stage - 1] if engine.addresses else "in process",
                    "layers": str(layers),
                    "state": self._stage_state,
                    "weight_bytes": known.weight_bytes if known is not None else None,
                    "peak_memory_bytes": known.peak_memory_bytes if known is not None else None,
                }
            )
        return {
            "version": __version__,
            "model": self._model,
            "has_chat_template": engine.chat_template.is_there,
            "schedule": engine.schedule_name,
            "draft": engine.source.name if engine.source is not None else "none",
            "max_positions": engine.checkpoint.max_positions,
            "stages": stages,
        }

    async def events(self, request: str | None = None) -> AsyncGenerator[Json, None]:
        """About four a second, until the service stops.

        ``request``: whose tree is wanted; ``None``: the newest running one's.
        """
        page = object()
        number: int | None = None  # of the next span to tell
        self._show(page, request, self._requests())
        try:
            await asyncio.sleep(FIRST_EVENT_S)
            while not self._service.is_stopping:
                now_s, requests = time.perf_counter(), self._requests()
                self._read(now_s, requests)
                timeline = self._timeline
                spans = timeline.since(now_s - FIRST_SPANS_S) if number is None else timeline.newer(number)
                number = timeline.num_spans
                tree = self._show(page, request, requests)
                yield {
                    **self._figures(now_s),
                    "requests": [figures.json() for figures in _listed(requests)],
                    "spans": [span._asdict() for span in spans],
                    "tree": tree,
                }
                await asyncio.sleep(EVENT_S)
        finally:
            self._watched.pop(page, None)
            self._trees.watch(frozenset(self._watched.values()))

    @property
    def _stage_state(self) -> str:
        return "up" if self._service.failure is None else "down"  # an engine that has failed ends all its workers

    def _requests(self) -> list[RequestFigures]:
        """All that are known, newest first."""
        live = [RequestFigures.of(ticket) for ticket in self._service.tickets]
        known = {(figures.name, figures.start_s): figures for figures in [*live, *self._ended]}
        return sorted(known.values(), key=lambda figures: -figures.start_s)

    def _read(self, now_s: float, requests: list[RequestFigures]) -> None:
        engine = self._service.engine
        names = {figures.request_id: figures.name for figures in requests if figures.request_id is not None}
        self._timeline.read(now_s, names, engine.trips)
        self._busy.append((now_s, {DRIVER_PLACE: self._driver.busy_s, **engine.busy_s}))
        while now_s - self._busy[0][0] > BUSY_S:
            self._busy.popleft()

    def _show(self, page: object, request: str | None, requests: list[RequestFigures]) -> Json | None:
        """Watch the tree that a page wants; returns it, if there is one by now."""
        running = [figures for figures in requests if figures.state == "running"]
        shown = next((figures for figures in running if request in (None, figures.name)), None)
        self._watched.pop(page, None)
        if shown is not None and shown.request_id is not None:
            self._watched[page] = shown.request_id
        self._trees.watch(frozenset(self._watched.values()))
        if page not in self._watched or shown is None:
            return None
        nodes = self._trees.nodes(self._watched[page], self._text)
        return None if nodes is None else {"request": shown.name, "nodes": nodes}

    def _figures(self, now_s: float) -> Json:
        service, engine = self._service, self._service.engine
        emissions = self._timeline.emissions(now_s - RATE_S)
        # The first one only begins the time in which the others came.
        since_s = max(now_s - emissions[0].time_s, EVENT_S) if emissions else RATE_S
        num_accepted = sum(emission.num_accepted for emission in emissions)
        num_verified = sum(emission.num_verified for emission in emissions)
        (start_s, before), (end_s, after) = self._busy[0], self._busy[-1]
        passed_s = end_s - start_s

        def share(place: int) -> float:
            """Work counts when its result has come, so that some of it may have begun earlier."""
            return min(1.0, (after.get(place, 0.0) - before.get(place, 0.0)) / passed_s) if passed_s else 0.0

        trips, stage_bytes = engine.trips, dict(engine.stage_bytes)
        stages = [
            {
                "stage": stage,
                "state": self._stage_state,
                "busy": share(stage),
                "round_trip_ms": 1000 * trips[stage].round_trip_s if stage in trips else None,
                "link_bytes": stage_bytes.get(stage, 0),
            }
            for stage in range(1, len(engine.partition) + 1)
        ]
        return {
            "now_s": now_s,
            "failure": service.failure,
            "running": engine.num_running,
            "waiting": service.num_waiting,
            "tokens_per_s": sum(emission.num_tokens for emission in emissions[1:]) / since_s,
            "mean_accepted": num_accepted / num_verified if num_verified else 0.0,
            "kv_usage": engine.num_slots_held / engine.num_slots if engine.num_slots else None,
            "driver_busy": share(DRIVER_PLACE),
            "stages": stages,
        }


def _listed(requests: list[RequestFigures]) -> list[RequestFigures]:
    """Where there are too many, those that run come before others."""
    chosen = sorted(requests, key=lambda figures: figures.state != "running")[:MAX_REQUESTS]
    return sorted(chosen, key=lambda figures: -figures.start_s)
