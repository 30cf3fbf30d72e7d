"""A model over its workers, for any number of requests at once. Single-threaded: whoever owns it calls ``step``.

It moves the messages between the driver and its workers, and keeps requests waiting until their keys and values fit
into the workers' memory. It knows tokens; ``llm`` and ``server`` know texts.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from flowspec.config import EngineConfig, ScheduleConfig
from flowspec.core import Ending, Partition, SamplingParams
from flowspec.draft.base import DraftSource
from flowspec.driver import Driver
from flowspec.engine.draft_worker import DraftWorker
from flowspec.engine.driver_model import DriverModel
from flowspec.engine.job import Job
from flowspec.engine.observer import Observer, Observers
from flowspec.engine.pipeline import Pipeline
from flowspec.engine.recovery import Recovery
from flowspec.engine.schedules import Schedules
from flowspec.engine.telemetry import Status, Telemetry
from flowspec.errors import TOO_LONG, FlowspecError, RequestError, UsageError, WorkerError
from flowspec.request.emissions import Emissions
from flowspec.request.request import Common, Request
from flowspec.wire.messages import Alive, Failed, Result

logger = logging.getLogger("flowspec.engine")

_LONGEST_WAIT_S = 0.5


class Engine:
    """Requests over one pipeline. A context manager; ``close`` ends what the pipeline has started.

    ``engine.spec.open_engine`` makes one of a model's name and settings. It owns the pipeline that it is given.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        model: DriverModel,
        schedule: str,
        schedules: ScheduleConfig,
        config: EngineConfig,
        recovery: Recovery | None = None,
        draft_worker: DraftWorker | None = None,
    ) -> None:
        """``pipeline``: whose workers are ready; ``schedule``: of requests that name none.

        ``recovery``: of this pipeline, where it is not a real one's. ``draft_worker``: that the draft is on.
        """
        self.pipeline = pipeline
        self.model = model
        self.config = config
        self._schedules = Schedules(pipeline, model.source, schedule, schedules)
        self._link = pipeline.spec.link
        self._recovery = recovery or Recovery(pipeline)
        self._draft_worker = draft_worker
        self._bytes_before = 0  # that the driver has sent and received in earlier sessions
        self._refused: list[Job] = []  # that could not begin, and of which nobody has been told yet
        self._request_ids = itertools.count()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by request id
        self._observers = Observers()
        self._telemetry = Telemetry(len(pipeline.partition))
        self._in_use = threading.RLock()  # whoever holds it may touch the connections
        self._close_wanted = False
        self._is_closed = False
        self._has_worked = True
        self._last_news = time.monotonic()
        self._last_probe = 0.0
        how = schedules.pipeline, model.checkpoint.max_positions, time.perf_counter, self._observers.on_work
        common = Common(model.head, *how, config.keeps_caches)
        num_slots, num_stages = pipeline.num_slots(config), len(pipeline.partition)
        taps = pipeline.spec.taps
        tapped = () if taps is None else taps.taps.layers
        self._driver = Driver(common, model.source, num_slots, config.likely_tokens, num_stages, tapped, model.memory)

    @property
    def schedule_name(self) -> str:
        """Of requests that name none."""
        return self._schedules.default

    @property
    def partition(self) -> Partition:
        return self.pipeline.partition

    def use_source(self, source: DraftSource) -> None:
        """Requests that come from now on draft with it."""
        self.model = replace(self.model, source=source)
        self._schedules.use_source(source)
        self._driver.use_source(source)

    def observe(self, observer: Observer) -> None:
        """Tell it of everything from now on."""
        self._observers.add(observer)

    # --- requests ---

    @property
    def served_defaults(self) -> dict[str, Any]:
        """Of a server's requests, and of a chat here, so that both give the same answers: OpenAI's, and the model's."""
        return {"temperature": 1.0, **self.model.checkpoint.sampling_defaults}

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, schedule: str | None = None) -> None:
        """Raises ``UsageError`` for what cannot be run. Looks at nothing that changes: any thread may call it."""
        if not prompt_ids:
            raise UsageError("the prompt is empty; give at least one token to continue")
        if not all(0 <= token_id < self.model.checkpoint.vocab_size for token_id in prompt_ids):
            raise UsageError(f"the prompt has token ids outside the vocabulary of {self.model.checkpoint.vocab_size}")
        if len(prompt_ids) >= self.model.checkpoint.max_positions:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens, but {self.model.checkpoint.name} has room for "
                f"{self.model.checkpoint.max_positions}, its answer included; shorten the prompt",
                code=TOO_LONG,
            )
        tree_size = self._schedules.tree_size(schedule)
        num_needed = self._driver.most_slots(len(prompt_ids), params.max_tokens, tree_size)
        num_slots = self.num_slots
        if num_slots is not None and num_needed > num_slots:
            raise UsageError(
                f"the prompt's {len(prompt_ids)} tokens and {params.max_tokens} more need {num_needed} slots in the "
                f"workers' KV caches, with those of the draft tree, and there are {num_slots}; ask for fewer tokens",
                code=TOO_LONG,
            )

    def room(self, num_prompt: int) -> int:
        """Tokens that can be generated behind so long a prompt; 0 or less for one that is too long."""
        room = self.model.checkpoint.max_positions - num_prompt
        if self.num_slots is None:
            return room
        return min(room, self.num_slots - self._driver.most_slots(num_prompt, 0, self._schedules.tree_size(None)))

    def make_job(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        schedule: str | None = None,
        is_chat: bool = False,
        name: str = "",
    ) -> Job:
        """A request that has come now. Any thread may call it. Raises ``UsageError`` as ``check`` does.

        ``is_chat``: whatever ends a turn ends it, and not only what ends a text.
        """
        schedule = schedule or self._schedules.default
        self.check(prompt_ids, params, schedule)
        if params.temperature > 0 and params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        end_ids = self.model.turn_end_ids if is_chat else self.model.checkpoint.eos_token_ids
        request = Request(next(self._request_ids), tuple(prompt_ids), params, end_ids)
        return Job(request, schedule, Emissions(time.perf_counter()), name, is_chat)

    def enqueue(self, job: Job) -> None:
        """Let ``step`` start it, first come, first served. Raises ``UsageError`` when the engine is closed."""
        if self._is_closed:
            raise UsageError("this model is closed; make a new one")
        self._waiting.append(job)

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, schedule: str | None = None, is_chat: bool = False
    ) -> Job:
        """``make_job`` and ``enqueue``."""
        job = self.make_job(prompt_ids, params, schedule, is_chat)
        self.enqueue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Give a request up; what is in flight dies where it is. One that has ended stays as it is."""
        self._stop(job, Ending.CANCELLED)

    def finish(self, job: Job) -> None:
        """As ``cancel``, but its text is complete: whoever reads it has found what it should end with."""
        self._stop(job, Ending.FINISHED)

    def fail(self, job: Job, error: Exception) -> None:
        """As ``cancel``, but because of an error in what is made of it."""
        self._stop(job, Ending.FAILED, error)

    def _stop(self, job: Job, ending: Ending, error: Exception | None = None) -> None:
        if job.is_finished:
            return
        if job in self._waiting:
            self._waiting.remove(job)
        elif self._running.pop(job.request.request_id, None) is not None and not self._is_closed:
            assert job.generation is not None, "it runs"
            self.pipeline.connections.send(self._driver.cancel(job.generation))
        self._end(job, ending, error)

    def _end(self, job: Job, ending: Ending, error: Exception | None = None) -> None:
        if error is not None:
            # Its caller is told of it; the log has all of it.
            level = logging.DEBUG if isinstance(error, FlowspecError) else logging.ERROR
            logger.log(level, "request %d met an error", job.request.request_id, exc_info=error)
            job.error = RequestError.of(error)
        job.ending, job.end_s, job.prepared = ending, time.perf_counter(), None
        self._observers.tell(lambda observer: observer.on_end(job))

    @property
    def num_slots(self) -> int | None:
        """Rows that the workers' KV caches have room for; ``None``: unknown."""
        return self._driver.budget.num_slots

    def status(self) -> Status:
        """How things are now. Any thread may ask."""
        return Status(
            0 if self._is_closed else len(self._running),
            len(self._waiting),
            self.num_slots,
            0 if self._is_closed else self._driver.budget.num_held,
            time.monotonic() - self._last_news if self._running else 0.0,
            self._telemetry.stages(self.pipeline, self._recovery.state_of),
            self._recovery.problem,
            self._recovery.num_recoveries,
            None if self._draft_worker is None else self._draft_worker.status,
        )

    # --- running ---

    def step(self, max_wait_s: float = _LONGEST_WAIT_S) -> list[Job]:
        """Do what there is to do, or wait up to ``max_wait_s``; returns the jobs that have more tokens, or have ended.

        When a worker is lost, all requests wait until it is back. Raises ``WorkerError`` when it does not come back:
        the engine is closed then.
        """
        try:
            with self._in_use:
                if self._is_closed:
                    raise UsageError("this model is closed; make a new one")
                if self._recovery.is_under_way:
                    return self._go_on_recovering(max_wait_s)
                try:
                    return self._step(max_wait_s)
                except WorkerError as error:
                    return self._interrupt(error)
        except FlowspecError:
            self.close()  # a pipeline with a hole is of no more use
            raise
        finally:
            if self._close_wanted:
                self.close()

    def _step(self, max_wait_s: float) -> list[Job]:
        connections = self.pipeline.connections
        self._start_waiting()
        wait_s = 0.0 if self._has_worked else max(0.0, min(max_wait_s, self._driver.wake_s - time.perf_counter()))
        for message in connections.receive(wait_s):
            if isinstance(message, Result):
                self._note_result(message)
            elif isinstance(message, Failed):
                logger.warning("worker %d, request %d: %s", message.stage, message.request_id, message.text)
                logger.debug("%s", message.traceback)
            connections.send(self._driver.on_message(message))
            if not isinstance(message, Alive):
                self._last_news = time.monotonic()
        if self._draft_worker is not None:
            self._draft_worker.listen(connections)
        if time.monotonic() - self._last_probe > self._link.heartbeat_s:
            self._last_probe = time.monotonic()
            connections.probe()
        sends = self._driver.on_idle()
        self._has_worked = sends is not None
        connections.send(sends or [])
        if self._running and time.monotonic() - self._last_news > self._link.stall_timeout_s:
            raise WorkerError(
                f"the pipeline has returned nothing for {self._link.stall_timeout_s:.0f} s; a worker hangs"
            )
        return self._news()

    def _interrupt(self, error: WorkerError) -> list[Job]:
        """The workers are lost: what was committed is told, and all requests wait, behind it, in their old order."""
        self._recovery.begin(error)
        self._driver.interrupt()
        return self._news()

    def _go_on_recovering(self, max_wait_s: float) -> list[Job]:
        pipeline = self._recovery.step(max_wait_s)
        if pipeline is not None:
            self._bytes_before += self.pipeline.connections.link_bytes
            self.pipeline = pipeline
            num_stages = len(pipeline.partition)
            self._telemetry.begin_session(num_stages)
            self._schedules.use(pipeline)
            self._driver.use(pipeline.num_slots(self.config), num_stages)
            for job in self._waiting:
                job.prepared = None  # for other workers
            self._last_news, self._has_worked = time.monotonic(), True
        return []

    def _start_waiting(self) -> None:
        """First come, first served: what does not fit yet is not overtaken."""
        while self._waiting and len(self._running) < self.config.max_running:
            job = self._waiting[0]
            try:
                job.prepared = job.prepared or self._schedules.prepare(job.schedule)
                if not self._driver.has_room(job.request, job.prepared, len(job.output_ids)):
                    break
                job.generation, sends = self._driver.submit(job.request, job.prepared, job.generation)
            except Exception as error:
                self._waiting.popleft()
                self._end(job, Ending.FAILED, error)
                self._refused.append(job)
                continue
            if self.model.source is not None and job.prepared.uses_draft:
                job.draft = self.model.source.name
            job.prepared = None
            self._waiting.popleft()
            if not self._running:
                self._last_news = time.monotonic()
            self._running[job.request.request_id] = job
            self._has_worked = True
            self.pipeline.connections.send(sends)

    def _note_result(self, result: Result) -> None:
        if self.pipeline.costs is not None:
            self.pipeline.costs.note(result.timings)
        self._telemetry.note(result.timings)
        job = self._running.get(result.request_id)
        if job is not None:
            self._observers.tell(lambda observer: observer.on_result(job, result))

    def _news(self) -> list[Job]:
        refused, self._refused = self._refused, []
        return [*refused, *(job for job in list(self._running.values()) if self._note_news(job))]

    def _note_news(self, job: Job) -> bool:
        """Whether the job has more tokens, or has ended."""
        num_tokens, num_before, generation = len(job.output_ids), job.emissions.num_tokens, job.generation
        assert generation is not None, "it runs"
        if num_tokens > num_before:
            self._recovery.note_progress()
            interval_s = job.emissions.note(time.perf_counter(), num_tokens)
            self._observers.tell(lambda observer: observer.on_tokens(job, num_tokens - num_before, interval_s))
        ending = generation.ending
        if ending is not None:
            del self._running[job.request.request_id]
        if ending is Ending.PREEMPTED:
            logger.debug("request %d gives its caches up and waits", job.request.request_id)
            self._wait_again(job)
        elif ending is not None:
            self._end(job, ending, generation.error)
        return num_tokens > num_before or job.is_finished

    def _wait_again(self, job: Job) -> None:
        """In the order in which the requests came."""
        place = sum(waiting.request.request_id < job.request.request_id for waiting in self._waiting)
        self._waiting.insert(place, job)

    @property
    def link_bytes(self) -> int:
        """Bytes on all links so far; the driver counts its own, the first hop included, workers the hops between."""
        of_draft = 0 if self._draft_worker is None else self._draft_worker.link_bytes
        return self._bytes_before + self.pipeline.connections.link_bytes + of_draft + self._telemetry.bytes_between

    def wake(self) -> None:
        """Let a ``step`` that waits return. Any thread may call it."""
        self.pipeline.connections.wake()

    # --- ending ---

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """End the workers that were started here; others go back to waiting. Safe to call twice.

        While another thread is inside ``step``, which alone may touch the connections, they close at its end.
        """
        self._close_wanted = True
        if not self._in_use.acquire(blocking=False):
            self.wake()
            return
        try:
            if not self._is_closed:
                self._is_closed = True
                self._recovery.close()
                if self._draft_worker is not None:
                    self._draft_worker.close()
                self.pipeline.close()
        finally:
            self._in_use.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
