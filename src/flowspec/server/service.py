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
from typing import Literal, Protocol

from flowspec.core import SamplingParams
from flowspec.engine.engine import Engine, Job
from flowspec.errors import FlowspecError, RequestError, WorkerError
from flowspec.llm import Run, TextChunk
from flowspec.request.stats import Stats

logger = logging.getLogger("flowspec.server")

IDLE_WAIT_S = 0.5  # of the engine's thread, at most
END_TIMEOUT_S = 10.0
_GOODBYE = "the server is shutting down"

End = Literal["finished", "cancelled", "failed"]


class QueueFullError(FlowspecError):
    """So many requests wait already that another one would wait too long."""


@dataclass(eq=False)
class Ticket:
    """One request at the service. Its text comes out of ``chunks``; all else is for statistics."""

    name: str  # as clients see it
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    is_chat: bool = False
    start_s: float = field(default_factory=time.perf_counter)  # on the driver's clock
    first_s: float | None = None  # when its first tokens came out
    last_s: float = 0.0  # when its newest tokens came out
    end_s: float | None = None
    num_tokens: int = 0  # that came out so far
    num_first: int = 0  # of them with the first emission
    end: End | None = None
    job: Job | None = None
    run: Run | None = None
    _chunks: asyncio.Queue[TextChunk | BaseException | None] = field(default_factory=asyncio.Queue)

    @property
    def state(self) -> Literal["waiting", "running"] | End:
        if self.end is not None:
            return self.end
        return "running" if self.job is not None and self.job.generation is not None else "waiting"

    @property
    def stats(self) -> Stats | None:
        return self.job.generation.stats if self.job is not None and self.job.generation is not None else None

    @property
    def finish_reason(self) -> str | None:
        return self.job.generation.finish_reason if self.job is not None and self.job.generation is not None else None

    @property
    def num_cached(self) -> int:
        """Prompt tokens that an earlier request had computed."""
        return self.job.generation.num_inherited if self.job is not None and self.job.generation is not None else 0

    @property
    def tokens_per_s(self) -> float:
        """After the first emission; 0 until there is a second one."""
        if self.first_s is None or self.last_s <= self.first_s:
            return 0.0
        return (self.num_tokens - self.num_first) / (self.last_s - self.first_s)

    async def chunks(self) -> AsyncIterator[TextChunk]:
        """What each verification added. Raises ``FlowspecError`` when the engine refuses or fails."""
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


class Observer(Protocol):
    """Told of what happens, on the engine's thread. One that raises is told no more."""

    def on_tokens(self, ticket: Ticket, num_new: int, interval_s: float | None) -> None:
        """``interval_s``: since the emission before; ``None`` for the first one."""

    def on_end(self, ticket: Ticket) -> None: ...


class Service:
    """Runs requests for the event loop that is running when it is started."""

    def __init__(self, engine: Engine, max_waiting: int, stuck_after_s: float) -> None:
        self.engine = engine
        self.failure: str | None = None  # why nothing works any more
        self.on_failure: Callable[[], None] = lambda: None  # called in the event loop when it is known
        self.observers: list[Observer] = []
        self._start_s = time.perf_counter()
        self._stuck_after_s = stuck_after_s
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._starting: dict[int, Ticket] = {}  # queued commands to start one, by the ticket's identity
        self._tickets: dict[int, Ticket] = {}  # by request id, until they end
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
        self.engine.check(prompt_ids, params)
        if self.num_waiting >= self._max_waiting:
            raise QueueFullError(f"{self.num_waiting} requests are waiting already; try again later")
        ticket = Ticket(name, tuple(prompt_ids), params, is_chat)
        self._starting[id(ticket)] = ticket
        self._do(lambda: self._start(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up; nothing happens to one that has ended."""
        if ticket.end_s is None:
            self._do(lambda: self._cancel(ticket))

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self.engine.wake()

    @property
    def num_waiting(self) -> int:
        return self.engine.num_waiting + len(self._starting)

    @property
    def uptime_s(self) -> float:
        return time.perf_counter() - self._start_s

    @property
    def is_stuck(self) -> bool:
        """Whether work is under way and no stage has said anything of it for long."""
        return self.engine.stalled_s > self._stuck_after_s

    @property
    def tickets(self) -> list[Ticket]:
        """Of requests that have not ended."""
        return list(self._tickets.values())

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
            for ticket in self.tickets:
                self._end(ticket, "failed", error)
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
        try:
            if self.failure is not None:
                raise WorkerError(self.failure)
            ticket.job = job = self.engine.submit(ticket.prompt_ids, ticket.params, is_chat=ticket.is_chat)
            self._tickets[job.request.request_id] = ticket
            ticket.run = Run(self.engine, job)
        except Exception as error:
            self._give_up(ticket, error)
        finally:
            self._starting.pop(id(ticket), None)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.end_s is None and ticket.job is not None:
            self.engine.cancel(ticket.job)
            self._end(ticket, "cancelled", None)

    def _publish(self, job: Job) -> None:
        ticket = self._tickets.get(job.request.request_id)
        if ticket is None:
            return  # it has ended meanwhile
        try:
            self._tell_new(ticket)
        except Exception as error:
            self._give_up(ticket, error)
            return
        if job.error is not None:
            self._end(ticket, "failed", job.error)
        elif job.is_finished:
            self._end(ticket, "finished", None)

    def _tell_new(self, ticket: Ticket) -> None:
        """What has come of a text since the last time."""
        assert ticket.run is not None, "it has not started"
        chunk = ticket.run.read()
        now, num_new = time.perf_counter(), len(chunk.token_ids)
        if num_new:
            interval_s = now - ticket.last_s if ticket.first_s is not None else None
            if ticket.first_s is None:
                ticket.first_s, ticket.num_first = now, num_new
            ticket.last_s, ticket.num_tokens = now, ticket.num_tokens + num_new
            self._observe(lambda observer: observer.on_tokens(ticket, num_new, interval_s))
        self._send(ticket, chunk)

    def _give_up(self, ticket: Ticket, error: Exception) -> None:
        """A fault in one request's work ends that request."""
        if ticket.job is not None and not self.engine.is_closed:
            self.engine.cancel(ticket.job)
        if not isinstance(error, FlowspecError):
            logger.error("a request met a bug", exc_info=error)
        self._end(ticket, "failed", RequestError.of(error))

    def _end(self, ticket: Ticket, end: End, error: BaseException | None) -> None:
        if ticket.end_s is not None:
            return
        ticket.end_s, ticket.end = time.perf_counter(), end
        if ticket.job is not None:
            self._tickets.pop(ticket.job.request.request_id, None)
        self._observe(lambda observer: observer.on_end(ticket))
        self._send(ticket, error)

    def _observe(self, tell: Callable[[Observer], None]) -> None:
        for observer in list(self.observers):
            try:
                tell(observer)
            except Exception:
                logger.exception("%s met a bug, and is told no more", type(observer).__name__)
                self.observers.remove(observer)

    def _send(self, ticket: Ticket, item: TextChunk | BaseException | None) -> None:
        self._call_in_loop(ticket._chunks.put_nowait, item)

    def _call_in_loop(self, call: Callable[..., object], *values: object) -> None:
        assert self._loop is not None, "start has not been called"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(call, *values)
