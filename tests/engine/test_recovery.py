"""Workers are killed and stopped in the middle of generations: real processes, and the texts of plain decoding."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engines import Fault, engine_of, hit, launcher_of, run
from flowspec import LLM, SamplingParams
from flowspec.config import LinkConfig
from flowspec.engine.engine import Engine
from flowspec.engine.job import Job
from flowspec.engine.recovery import MAX_LOSSES
from flowspec.errors import WorkerError

LINK = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5, rejoin_timeout_s=60)
PROMPT = (1, 4, 2, 1, 4, 2, 3)
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def kill_on(engine: Engine, stage: int, how_often: int) -> None:
    """Step for ever; kill a stage's worker whenever there is another one."""
    killed: set[int] = set()
    while True:
        pid = launcher_of(engine).pids.get(stage)
        if pid is not None and pid not in killed and len(killed) < how_often:
            killed.add(pid)
            os.kill(pid, KILL)
        engine.step(0.05)


def test_no_token_is_lost_doubled_or_changed_when_workers_die_or_stop(checkpoint_dir: Callable[[str], Path]) -> None:
    """Greedy and sampled, with penalties and log-probabilities, by several schedules at once."""
    directory = checkpoint_dir("qwen2")
    kinds = [
        ((i, *PROMPT), SamplingParams(40, i % 2 * 0.8, seed=i, frequency_penalty=i % 3 * 0.2, num_logprobs=1))
        for i in range(4)
    ]
    schedules = ["flow", "ar", "lockstep", "flow"]
    with engine_of(directory, stages=3, link=LINK) as engine:

        def submit() -> list[Job]:
            return [engine.submit(*kind, schedule) for kind, schedule in zip(kinds, schedules, strict=True)]

        undisturbed, disturbed = submit(), submit()
        for job in disturbed:
            engine._waiting.remove(job)
        run(engine, undisturbed)
        assert engine.status().num_recoveries == 0
        before = launcher_of(engine).pids
        for job in disturbed:
            engine.enqueue(job)
        # The last but one also in the middle of prompts that are computed again.
        faults = [Fault(0, 2, KILL), Fault(30, 3, KILL), Fault(30, 1, KILL), Fault(90, 2, STOP)]
        run(engine, disturbed, faults)
        status = engine.status()
        assert status.num_recoveries >= 3 and status.problem is None and status.num_slots_held == 0
        assert all(launcher_of(engine).pids[stage] != before[stage] for stage in (1, 2, 3))
        assert engine.link_bytes > 0
        for job, other in zip(disturbed, undisturbed, strict=True):
            assert job.error is None and job.output_ids == other.output_ids
            for got, expected in zip(job.output_logprobs, other.output_logprobs, strict=True):
                assert got.token_id == expected.token_id and got.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert {job.stats.preemptions for job in undisturbed if job.stats is not None} == {0}


def test_a_stream_goes_on_up_to_its_stop_string_and_others_keep_their_weights(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    with LLM(checkpoint_dir("llama"), stages=2, link=LINK) as llm:
        text = llm.generate(PROMPT, SamplingParams(80)).text
        params = SamplingParams(80, stop=(text[len(text) * 3 // 4 :][:8],))
        expected = llm.generate(PROMPT, params).text
        before = launcher_of(llm.engine).pids
        got = ""
        for chunk in llm.stream(PROMPT, params):
            if not got:
                hit(llm.engine, 2, KILL)
            got += chunk.text
        after = launcher_of(llm.engine).pids
        assert got == expected and 0 < len(got) < len(text)
        assert after[1] == before[1] and after[2] != before[2]
        assert llm.engine.status().num_recoveries == 1


def test_requests_that_wait_keep_waiting_and_can_be_cancelled_meanwhile(checkpoint_dir: Callable[[str], Path]) -> None:
    with engine_of(checkpoint_dir("llama"), stages=2, link=LINK, draft="none", schedule="ar") as engine:
        expected = engine.submit(PROMPT, SamplingParams(20))
        run(engine, [expected])
        hit(engine, 1, KILL)
        while engine.status().problem is None:
            engine.step()
        status = engine.status()
        assert status.problem is not None and status.problem.startswith("worker 1 is away")
        assert "away" in [stage.state for stage in status.stages]
        waiting, unwanted = (engine.submit(PROMPT, SamplingParams(20)) for _ in range(2))
        engine.cancel(unwanted)
        run(engine, [waiting])
        assert waiting.output_ids == expected.output_ids and not unwanted.output_ids
        assert [stage.state for stage in engine.status().stages] == ["up", "up"]


def test_a_worker_that_dies_again_and_again_is_an_error_that_names_it(checkpoint_dir: Callable[[str], Path]) -> None:
    with engine_of(checkpoint_dir("llama"), stages=2, link=LINK, names=["kitchen", "attic"]) as engine:
        engine.submit(PROMPT, SamplingParams(80))
        processes = psutil.Process(launcher_of(engine)._forker.pid)
        with pytest.raises(WorkerError, match=rf"worker 2 \(attic\) was lost {MAX_LOSSES} times, and no token"):
            kill_on(engine, 2, MAX_LOSSES)
        assert not processes.is_running(), "what was started here has ended"


def test_a_loss_that_nobody_waits_for_is_an_error_at_once(checkpoint_dir: Callable[[str], Path]) -> None:
    link = LinkConfig(heartbeat_timeout_s=1.5, rejoin_timeout_s=0)
    with engine_of(checkpoint_dir("llama"), stages=2, link=link) as engine:
        engine.submit(PROMPT, SamplingParams(80))
        with pytest.raises(WorkerError, match="worker 1"):
            kill_on(engine, 1, 1)


@pytest.mark.parametrize("sent", [KILL, STOP])
def test_workers_that_are_lost_with_whoever_forks_them_come_back(
    checkpoint_dir: Callable[[str], Path], sent: signal.Signals
) -> None:
    with engine_of(checkpoint_dir("llama"), stages=2, link=LINK, draft="none", schedule="ar") as engine:
        undisturbed, job = (engine.submit(PROMPT, SamplingParams(60)) for _ in range(2))
        engine._waiting.remove(job)
        run(engine, [undisturbed])
        engine.enqueue(job)
        while not job.output_ids:
            engine.step()
        workers = [psutil.Process(pid) for pid in launcher_of(engine).pids.values()]
        os.kill(launcher_of(engine)._forker.pid, sent)
        if sent == STOP:
            workers[0].kill()
        run(engine, [job])
        assert job.output_ids == undisturbed.output_ids
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
