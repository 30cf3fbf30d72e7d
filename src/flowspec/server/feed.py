"""What the dashboard shows: measured on the engine's thread, told in the event loop. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from flowspec import __version__
from flowspec.engine.job import Job
from flowspec.engine.observer import Observer
from flowspec.engine.telemetry import StageStatus
from flowspec.request.generation import Generation
from flowspec.request.work import Work
from flowspec.server.service import Service
from flowspec.server.timeline import DRIVER_PLACE, DriverWork, Emission, Forwards, Timeline
from flowspec.server.tree_view import TreeWatch
from flowspec.wire.messages import Result

Json: TypeAlias = dict[str, Any]

EVENT_S = 0.25
FIRST_EVENT_S = 0.1  # in which a tree may turn up
FIRST_SPANS_S = 2.0  # that a new connection is told of
RATE_S = 5.0  # that rates are taken over
BUSY_S = 2.0  # that busy shares are taken over
MAX_REQUESTS = 20
_ON_RESULTS = (Work.LM_HEAD, Work.VERIFY)


@dataclass(frozen=True)
class RequestFigures:
    """A line in the list of requests; outlives its job."""

    request_id: int  # of the engine
    name: str
    state: str
    start_s: float
    num_prompt: int
    num_tokens: int
    tokens_per_s: float
    mean_accepted: float

    @classmethod
    def of(cls, job: Job) -> RequestFigures:
        return cls(
            job.request.request_id,
            job.name,
            job.state,
            job.emissions.start_s,
            len(job.request.prompt_ids),
            job.emissions.num_tokens,
            0.0 if job.emissions.came_at_once else job.emissions.tokens_per_s,
            job.stats.mean_accepted if job.stats is not None else 0.0,
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


class Feed(Observer):
    """An observer of a service's engine, and what every open page is told of it.

    Call ``watch`` before the service starts. What happens is only noted, in bounded memory; as long as no page is open
    nobody reads the notes.
    """

    def __init__(self) -> None:
        self._timeline = Timeline()
        self._trees = TreeWatch()
        # Written on the engine's thread:
        self._driver_s = 0.0  # of the driver's work
        self._newest: tuple[Generation, int] | None = None  # whose result came last, and its segment
        self._counted: dict[int, tuple[int, int]] = {}  # accepted and verified so far, by running request
        self._ended: deque[RequestFigures] = deque(maxlen=MAX_REQUESTS)
        # The event loop's:
        self._watched: dict[object, int] = {}  # the request whose tree each page shows
        self._busy: deque[tuple[float, dict[int, float]]] = deque()  # time, and seconds of work by place until then

    def watch(self, service: Service, model: str | None = None) -> None:
        """``model``: what clients call it; by default its directory's name."""
        self._service = service
        self._model = model or service.engine.model.checkpoint.title
        service.engine.observe(self)
        self._text = service.engine.model.vocabulary.token_text

    # --- on the engine's thread ---

    def on_work(self, kind: Work, num_rows: int, start_s: float, end_s: float) -> None:
        self._driver_s += end_s - start_s
        request_id, segment_id = None, -1
        if self._newest is not None and kind in _ON_RESULTS:
            generation, newest_id = self._newest
            # Schedules in lock-step may read an earlier result first; what was read is in flight no more.
            if newest_id not in generation.in_flight:
                request_id, segment_id = generation.request.request_id, newest_id
        self._timeline.inbox.append(DriverWork(kind, num_rows, start_s, end_s, request_id, segment_id))

    def on_result(self, job: Job, result: Result) -> None:
        generation = job.generation
        assert generation is not None, "it runs"
        self._newest = generation, result.segment_id
        stats = generation.stats.by_segment.get(result.segment_id)
        self._timeline.inbox.append(Forwards(result.request_id, result.segment_id, tuple(result.timings), stats))
        self._trees.look(generation, time.perf_counter())

    def on_tokens(self, job: Job, num_new: int, interval_s: float | None) -> None:
        request_id, stats = job.request.request_id, job.stats
        assert stats is not None, "it runs"
        accepted, verified = self._counted.get(request_id, (0, 0))
        self._counted[request_id] = stats.accepted, stats.verified
        emission = Emission(job.emissions.last_s, num_new, stats.accepted - accepted, stats.verified - verified)
        self._timeline.inbox.append(emission)

    def on_end(self, job: Job) -> None:
        self._counted.pop(job.request.request_id, None)
        self._newest = None
        self._ended.append(RequestFigures.of(job))

    # --- in the event loop ---

    def state(self) -> Json:
        """What does not change while the server runs, but for the stages' state."""
        engine = self._service.engine
        model, status = engine.model, engine.status()
        stages: list[Json] = [
            {
                "stage": stage.stage,
                "device": stage.device,
                "address": stage.address or "in process",
                "layers": stage.layers,
                "state": self._state_of(stage),
                "weight_bytes": stage.weight_bytes,
                "peak_memory_bytes": stage.peak_memory_bytes,
                "load_s": stage.load_s,
                "fetched_bytes": stage.fetched_bytes,
            }
            for stage in status.stages
        ]
        return {
            "version": __version__,
            "model": self._model,
            "has_chat_template": model.chat_template.is_there,
            "schedule": engine.schedule_name,
            "draft": model.source.name if model.source is not None else "none",
            "draft_worker": None if status.draft_worker is None else status.draft_worker.address,
            "max_positions": model.checkpoint.max_positions,
            "stages": stages,
        }

    async def events(self, request: str | None = None) -> AsyncGenerator[Json, None]:
        """About four a second, until the service stops.

        ``request``: whose tree is wanted; ``None``: the newest running one's.
        """
        page = object()
        number: int | None = None  # of the next span to tell
        self._show(page, request, self._requests())
        self._read(time.perf_counter(), self._requests())  # from here on the first event knows how busy all were
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

    def _state_of(self, stage: StageStatus) -> str:
        return (
            stage.state if self._service.failure is None else "down"
        )  # an engine that has failed ends all its workers

    def _requests(self) -> list[RequestFigures]:
        """All that are known, newest first."""
        live = [RequestFigures.of(job) for job in self._service.jobs]
        known = {(figures.name, figures.start_s): figures for figures in [*live, *self._ended]}
        return sorted(known.values(), key=lambda figures: -figures.start_s)

    def _read(self, now_s: float, requests: list[RequestFigures]) -> None:
        stages = self._service.engine.status().stages
        names = {figures.request_id: figures.name for figures in requests}
        self._timeline.read(now_s, names, {stage.stage: stage.trip for stage in stages if stage.trip is not None})
        self._busy.append((now_s, {DRIVER_PLACE: self._driver_s} | {stage.stage: stage.busy_s for stage in stages}))
        while now_s - self._busy[0][0] > BUSY_S:
            self._busy.popleft()

    def _show(self, page: object, request: str | None, requests: list[RequestFigures]) -> Json | None:
        """Watch the tree that a page wants; returns it, if there is one by now."""
        running = [figures for figures in requests if figures.state == "running"]
        shown = next((figures for figures in running if request in (None, figures.name)), None)
        self._watched.pop(page, None)
        if shown is not None:
            self._watched[page] = shown.request_id
        self._trees.watch(frozenset(self._watched.values()))
        if page not in self._watched or shown is None:
            return None
        nodes = self._trees.nodes(self._watched[page], self._text)
        return None if nodes is None else {"request": shown.name, "nodes": nodes}

    def _figures(self, now_s: float) -> Json:
        service, status = self._service, self._service.engine.status()
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

        stages = [
            {
                "stage": stage.stage,
                "state": self._state_of(stage),
                "busy": share(stage.stage),
                "round_trip_ms": None if stage.trip is None else 1000 * stage.trip.round_trip_s,
                "link_bytes": stage.link_bytes,
            }
            for stage in status.stages
        ]
        return {
            "now_s": now_s,
            "failure": service.failure,
            "problem": status.problem,
            "running": status.num_running,
            "waiting": service.num_waiting,
            "tokens_per_s": sum(emission.num_tokens for emission in emissions[1:]) / since_s,
            "mean_accepted": num_accepted / num_verified if num_verified else 0.0,
            "kv_usage": status.kv_usage,
            "driver_busy": share(DRIVER_PLACE),
            "draft_worker": None if status.draft_worker is None else asdict(status.draft_worker),
            "stages": stages,
        }


def _listed(requests: list[RequestFigures]) -> list[RequestFigures]:
    """Where there are too many, those that run come before others."""
    chosen = sorted(requests, key=lambda figures: figures.state != "running")[:MAX_REQUESTS]
    return sorted(chosen, key=lambda figures: -figures.start_s)
