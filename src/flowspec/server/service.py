"""An engine in a thread of its own, for callers in an event loop. Knows texts and requests; knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from flowspec.core import SamplingParams
from flowspec.engine.engine import Engine
from flowspec.engine.job import Job
from flowspec.errors import FlowspecError, RequestError, WorkerError
from flowspec.llm import Run, TextChunk

logger = logging.getLogger("flowspec.server")

IDLE_WAIT_S = 0.5  # of the engine's thread, at most
END_TIMEOUT_S = 10.0
_GOODBYE = "the server is shutting down"


class QueueFullError(FlowspecError):
    """So many requests wait already that another one would wait too long."""


@dataclass(eq=False)
class Ticket:
    """One request at the service: a job of its engine, whose text comes out of ``chunks``."""

    job: Job
    run: Run
    is_over: bool = False  # nothing more will come out
    _chunks: asyncio.Queue[TextChunk | BaseException | None] = field(default_factory=asyncio.Queue)

    async def chunks(self) -> AsyncIterator[TextChunk]:
        """What each verification added. Raises ``FlowspecError`` when the engine refuses or fails."""
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


class Service:
    """Runs requests for the event loop that is running when it is started."""

    def __init__(self, engine: Engine, max_waiting: int, stuck_after_s: float) -> None:
        self.engine = engine
        self.failure: str | None = None  # why nothing works any more
        self.on_failure: Callable[[], None] = lambda: None  # called in the event loop when it is known
        self._start_s = time.perf_counter()
        self._stuck_after_s = stuck_after_s
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by request id, until they are over
        self._starting: set[int] = set()  # request ids that the engine does not know yet
        self.is_stopping = False  # streams that have no end of their own end then
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="flowspec-engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Cancel everything and end the engine, in its own thread. May be called again."""
        self.is_stopping = True
        self.engine.wake()
        await asyncio.to_thread(self._thread.join, END_TIMEOUT_S)
        if self._thread.is_alive() and self.failure is None:
            self.failure = f"the engine did not end within {END_TIMEOUT_S:.0f} s"

    # --- called in the event loop ---

    def submit(self, name: str, prompt_ids: Sequence[int], params: SamplingParams, is_chat: bool = False) -> Ticket:
        """Queue a request. Raises ``UsageError`` for an impossible one, ``QueueFullError``, ``WorkerError``."""
        if self.failure is not None or self.is_stopping:
            raise WorkerError(self.failure or _GOODBYE)
        job = self.engine.make_job(prompt_ids, params, is_chat=is_chat, name=name)
        if self.num_waiting >= self._max_waiting:
            raise QueueFullError(f"{self.num_waiting} requests are waiting already; try again later")
        ticket = Ticket(job, Run(self.engine, job))
        self._tickets[job.request.request_id] = ticket
        self._starting.add(job.request.request_id)
        self._do(lambda: self._start(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up; nothing happens to one that has ended."""
        if not ticket.is_over:
            self._do(lambda: self._cancel(ticket))

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self.engine.wake()

    @property
    def num_waiting(self) -> int:
        return self.engine.status().num_waiting + len(self._starting)

    @property
    def uptime_s(self) -> float:
        return time.perf_counter() - self._start_s

    @property
    def is_stuck(self) -> bool:
        """Whether work is under way and no stage has said anything of it for long."""
        return self.engine.status().stalled_s > self._stuck_after_s

    @property
    def jobs(self) -> list[Job]:
        """That have not ended."""
        return [ticket.job for ticket in list(self._tickets.values())]

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            while not self.is_stopping:
                self._obey()
                for job in self.engine.step(IDLE_WAIT_S):
                    self._publish(job)
        except Exception as error:  # the one broad catch of this thread: whatever it is, clients must hear of it
            self._note_failure(error)
        error = WorkerError(self.failure or _GOODBYE)
        while True:
            self._obey()  # whoever came just before the end was noticed waits in the queue
            for ticket in list(self._tickets.values()):
                self._give_up(ticket, error)
            if self.is_stopping:
                break
            with contextlib.suppress(queue.Empty):
                self._commands.get(timeout=IDLE_WAIT_S)()
        try:
            self.engine.close()
        except Exception:
            logger.exception("the engine did not end well")

    def _note_failure(self, error: Exception) -> None:
        if not isinstance(error, FlowspecError):
            logger.error("the engine failed", exc_info=error)
        self.failure = str(error) or type(error).__name__
        logger.error("nothing can be generated any more: %s", self.failure)
        self._call_in_loop(self.on_failure)

    def _obey(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _start(self, ticket: Ticket) -> None:
        self._starting.discard(ticket.job.request.request_id)
        if self.failure is not None:
            self._give_up(ticket, WorkerError(self.failure))
        else:
            self.engine.enqueue(ticket.job)

    def _cancel(self, ticket: Ticket) -> None:
        self.engine.cancel(ticket.job)
        self._close(ticket, None)

    def _publish(self, job: Job) -> None:
        """What has come of a text since the last time."""
        ticket = self._tickets.get(job.request.request_id)
        if ticket is None:
            return  # it is over
        try:
            self._send(ticket, ticket.run.read())
        except Exception as error:
            self._give_up(ticket, error)
            return
        if job.is_finished:
            self._close(ticket, job.error)

    def _give_up(self, ticket: Ticket, error: Exception) -> None:
        """A fault in one request's work ends that request."""
        self.engine.fail(ticket.job, error)
        self._close(ticket, RequestError.of(error))

    def _close(self, ticket: Ticket, error: BaseException | None) -> None:
        if not ticket.is_over:
            ticket.is_over = True
            del self._tickets[ticket.job.request.request_id]
            self._send(ticket, error)

    def _send(self, ticket: Ticket, item: TextChunk | BaseException | None) -> None:
        self._call_in_loop(ticket._chunks.put_nowait, item)

    def _call_in_loop(self, call: Callable[..., object], *values: object) -> None:
        assert self._loop is not None, "start has not been called"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(call, *values)
