"""The engine's thread under an event loop: progress, its absence, and ends of all kinds."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines import engine_of
from flowspec.config import EngineConfig, LinkConfig
from flowspec.core import SamplingParams
from flowspec.engine.engine import Engine
from flowspec.engine.job import Job
from flowspec.engine.observer import Observer
from flowspec.errors import UsageError, WorkerError
from flowspec.schedule.base import Schedule
from flowspec.server.service import QueueFullError, Service, Ticket
from server_process import forked_workers

PROMPT = (1, 4, 2, 1, 4, 2, 3)
WAIT_S = 30.0


async def text_of(ticket: Ticket) -> str:
    return "".join([chunk.text async for chunk in ticket.chunks()])


async def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.02)


def test_a_stage_that_stands_still_is_noticed_while_there_is_work_and_only_then(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    async def run(engine: Engine) -> None:
        service = Service(engine, max_waiting=4, stuck_after_s=0.5)
        service.start()
        victim = forked_workers(psutil.Process())[-1]
        try:
            await text_of(service.submit("a", PROMPT, SamplingParams(5)))
            os.kill(victim.pid, signal.SIGSTOP)
            await asyncio.sleep(1.0)
            assert not service.is_stuck, "there is nothing to do"
            ticket = service.submit("b", PROMPT, SamplingParams(20))
            await until(lambda: service.is_stuck)
            os.kill(victim.pid, signal.SIGCONT)
            assert await text_of(ticket) and not service.is_stuck and service.failure is None
        finally:
            os.kill(victim.pid, signal.SIGCONT)
            await service.stop()

    link = LinkConfig(heartbeat_timeout_s=60)  # else it would be replaced
    with engine_of(checkpoint_dir("llama"), stages=2, draft="ngram", link=link) as engine:
        asyncio.run(run(engine))


def test_requests_end_when_the_service_does_and_later_ones_are_refused(checkpoint_dir: Callable[[str], Path]) -> None:
    async def run(engine: Engine) -> None:
        service = Service(engine, max_waiting=4, stuck_after_s=5)
        service.start()
        running = service.submit("a", PROMPT, SamplingParams(200))
        await anext(running.chunks())
        unheard = service.submit("b", PROMPT, SamplingParams(200))
        await service.stop()
        for ticket in (running, unheard):
            with pytest.raises(WorkerError, match="shutting down"):
                await text_of(ticket)
            assert ticket.job.state == "failed"
        with pytest.raises(WorkerError, match="shutting down"):
            service.submit("c", PROMPT, SamplingParams(2))
        await service.stop()

    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none") as engine:
        asyncio.run(run(engine))


def test_a_bug_in_the_engine_ends_all_requests_with_an_error(
    checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(engine: Engine) -> None:
        service = Service(engine, max_waiting=4, stuck_after_s=5)
        service.start()
        ticket = service.submit("a", PROMPT, SamplingParams(200))
        await anext(ticket.chunks())

        def fail(*args: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(engine, "step", fail)
        with pytest.raises(WorkerError, match="a bug"):
            await text_of(ticket)
        assert service.failure == "a bug"
        with pytest.raises(WorkerError, match="a bug"):
            service.submit("b", PROMPT, SamplingParams(2))
        await service.stop()

    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none") as engine:
        asyncio.run(run(engine))


def test_cancelling_counts_nobody_as_waiting(checkpoint_dir: Callable[[str], Path]) -> None:
    async def run(engine: Engine) -> None:
        service = Service(engine, max_waiting=1, stuck_after_s=5)
        service.start()
        tickets = [service.submit(name, PROMPT, SamplingParams(200)) for name in "a"]
        await anext(tickets[0].chunks())
        for _ in range(50):
            service.cancel(tickets[0])
        assert service.num_waiting == 0
        assert await text_of(service.submit("b", PROMPT, SamplingParams(2)))
        await service.stop()

    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none") as engine:
        asyncio.run(run(engine))


def test_an_observer_that_raises_is_told_no_more_and_hurts_nobody(checkpoint_dir: Callable[[str], Path]) -> None:
    class Broken(Observer):
        num_told = 0

        def on_tokens(self, job: Job, num_new: int, interval_s: float | None) -> None:
            self.num_told += 1
            raise RuntimeError("a bug")

        def on_end(self, job: Job) -> None:
            raise AssertionError("it was told again")

    class Worse(Observer):
        num_told = 0

        def on_result(self, job: Job, result: object) -> None:
            self.num_told += 1
            raise RuntimeError("a bug")

    broken, worse = Broken(), Worse()

    async def run(engine: Engine) -> None:
        service = Service(engine, max_waiting=4, stuck_after_s=5)
        engine.observe(broken)
        engine.observe(worse)
        service.start()
        assert await text_of(service.submit("a", PROMPT, SamplingParams(20)))
        assert service.failure is None and broken.num_told == worse.num_told == 1
        await service.stop()

    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none") as engine:
        asyncio.run(run(engine))


def test_a_thread_that_closes_an_engine_leaves_its_connections_to_the_one_that_uses_them(
    checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closers: list[str] = []
    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none") as engine:
        connections = engine.pipeline.connections
        monkeypatch.setattr(connections, "close", lambda: closers.append(threading.current_thread().name))
        entered, leave = threading.Event(), threading.Event()

        def stuck(timeout_s: float) -> list[Any]:
            entered.set()
            assert leave.wait(WAIT_S)
            return []

        monkeypatch.setattr(connections, "receive", stuck)
        thread = threading.Thread(target=engine.step, name="user")
        thread.start()
        assert entered.wait(WAIT_S)
        engine.close()
        assert not closers, "the other thread is inside a step"
        leave.set()
        thread.join(WAIT_S)
        assert closers == ["user"] and engine.is_closed


def test_a_job_has_one_schedule_made_for_it_however_long_it_waits(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    config = EngineConfig(kv_slots=400, likely_tokens=60)
    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none", config=config) as engine:
        for _ in range(2):
            engine.submit(PROMPT, SamplingParams(60))
        engine.step()
        waiting = engine.submit(PROMPT, SamplingParams(20))
        prepared: list[Schedule] = []
        while waiting.generation is None:
            engine.step()
            prepared += [] if waiting.prepared is None else [waiting.prepared]
        assert len(prepared) > 1 and len({id(schedule) for schedule in prepared}) == 1


def test_what_never_fits_is_refused_and_so_is_one_too_many(checkpoint_dir: Callable[[str], Path]) -> None:
    async def run(engine: Engine) -> None:
        service = Service(engine, max_waiting=2, stuck_after_s=5)
        service.start()
        with pytest.raises(UsageError, match="KV caches"):
            service.submit("a", PROMPT, SamplingParams(240))
        most = engine.room(len(PROMPT))
        assert 60 < most < 240 - len(PROMPT) and await text_of(service.submit("a", PROMPT, SamplingParams(most)))
        with pytest.raises(UsageError, match="KV caches"):
            service.submit("a", PROMPT, SamplingParams(most + 1))
        tickets = [service.submit("b", PROMPT, SamplingParams(60)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="waiting already"):
            [service.submit("c", PROMPT, SamplingParams(60)) for _ in range(20)]
        service.cancel(tickets[-1])
        await until(lambda: tickets[-1].job.state == "cancelled")
        assert await text_of(tickets[-1]) == ""
        assert len({await text_of(ticket) for ticket in tickets[:-1]}) == 1
        await service.stop()

    config = EngineConfig(max_running=1, kv_slots=240)
    with engine_of(
        checkpoint_dir("llama"), stages=1, in_process=True, draft="none", schedule="ar", config=config
    ) as engine:
        asyncio.run(run(engine))
