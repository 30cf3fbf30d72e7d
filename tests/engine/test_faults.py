"""A fault in one request's work ends that request, with an error; every other one gets the text that it gets alone."""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import shutil
import weakref
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from random import Random
from typing import TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

from chains import add_path
from engines import engine_of, workers_of
from flowspec import LLM
from flowspec.config import EngineConfig, LockstepConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import SamplingParams, TokenLogprobs
from flowspec.draft.base import Accepted, Draft
from flowspec.draft.ngram import NgramSource
from flowspec.engine.engine import Engine
from flowspec.errors import FlowspecError, NumericalError, RequestError
from flowspec.model.stage import Part, Stage, StageCache, Watch
from flowspec.sampling import Sampler
from flowspec.server.service import Service, Ticket
from flowspec.tree import DraftTree, Ints
from flowspec.wire.messages import Failed, Segment
from pump import Pump

OPENS, EXPANDS, COMMITS, SENDS = 90, 91, 92, 93  # a prompt's first token says where its draft fails
FAULTS = (OPENS, EXPANDS, COMMITS, SENDS)
PROMPT = (1, 4, 2, 1, 4, 2, 3, 1, 4, 2)
SMALL_TREE = TreeConfig(size=8, min_probability=0.0)


class FaultySource:
    """n-grams; drafts of marked prompts raise, or name a token that no embedding has, which a worker meets."""

    name = "faulty"
    steady_steps = 1
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> Draft:
        if prompt_ids[0] == OPENS:
            raise RuntimeError("a bug in open")
        return FaultyDraft(prompt_ids[0], NgramSource().open(prompt_ids, sampler, top_k))


class FaultyDraft:
    def __init__(self, fault: int, inner: Draft) -> None:
        self._fault = fault
        self._inner = inner
        self._num_commits = 0

    def read_prompt(self, node_ids: Sequence[int], features: torch.Tensor) -> None:
        self._inner.read_prompt(node_ids, features)

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._num_commits += 1
        if self._fault == COMMITS and self._num_commits == 3:
            raise KeyError("a bug in commit")
        self._inner.commit(accepted, tree)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        if self._fault == EXPANDS and self._num_commits >= 2:
            raise ZeroDivisionError("a bug in expand")
        if self._fault == SENDS and self._num_commits >= 1:
            add_path(tree, 0, [10**6], [0.0])
        return self._inner.expand(tree, rows)


Kind: TypeAlias = tuple[tuple[int, ...], SamplingParams]


def solo(directory: Path, jobs: Sequence[Kind]) -> list[list[int]]:
    return _solo(directory, tuple(jobs))


@functools.cache
def _solo(directory: Path, jobs: tuple[Kind, ...]) -> list[list[int]]:
    with LLM(directory, stages=1, in_process=True, draft="none", schedule="ar") as llm:
        return [llm.generate(prompt, params).token_ids for prompt, params in jobs]


async def outcome(ticket: Ticket) -> list[int] | FlowspecError:
    try:
        return [token_id async for chunk in ticket.chunks() for token_id in chunk.token_ids]
    except FlowspecError as error:
        return error


def test_three_hundred_requests_of_which_a_tenth_fail_inside(checkpoint_dir: Callable[[str], Path]) -> None:
    directory, rng = checkpoint_dir("llama"), Random(5)
    kinds = [
        ((i, *PROMPT), SamplingParams(rng.randint(4, 16), rng.choice([0.0, 0.9]), seed=i, ignore_eos=True))
        for i in range(12)
    ]
    expected = solo(directory, kinds)
    chosen = [rng.randrange(len(kinds)) if number % 10 else None for number in range(300)]

    async def run(engine: Engine) -> list[list[int] | FlowspecError]:
        service = Service(engine, max_waiting=300, stuck_after_s=30)
        service.start()
        tickets: list[Ticket] = []
        for number, kind in enumerate(chosen):
            faulty = (FAULTS[number // 10 % len(FAULTS)], *PROMPT), SamplingParams(24, ignore_eos=True)
            tickets.append(service.submit(str(number), *(faulty if kind is None else kinds[kind])))
        outcomes = await asyncio.gather(*map(outcome, tickets))
        assert service.failure is None and engine.status().num_running == engine.status().num_slots_held == 0
        await service.stop()
        return outcomes

    config = EngineConfig(max_running=16, keeps_caches=False)
    with engine_of(directory, stages=3, draft=FaultySource(), schedule="flow", config=config) as engine:
        outcomes = asyncio.run(run(engine))
    for kind, got in zip(chosen, outcomes, strict=True):
        if kind is None:
            assert isinstance(got, RequestError), got
        else:
            assert got == expected[kind]
    told = {str(got) for got in outcomes if isinstance(got, RequestError)}
    assert any("ZeroDivisionError: a bug in expand" in text for text in told)
    assert any("worker 1 cannot go on with this request: there is no token 1000000" in text for text in told)


def test_an_error_reaches_the_caller_of_a_model_which_goes_on(checkpoint_dir: Callable[[str], Path]) -> None:
    with LLM(checkpoint_dir("llama"), stages=2, in_process=True, draft=FaultySource(), schedule="flow") as llm:
        for fault in FAULTS:
            with pytest.raises(RequestError):
                llm.generate((fault, *PROMPT), SamplingParams(24))
            with pytest.raises(RequestError):
                list(llm.stream((fault, *PROMPT), SamplingParams(24)))
        assert len(llm.generate(PROMPT, SamplingParams(24)).token_ids) == 24


def test_text_that_came_before_an_error_is_delivered(checkpoint_dir: Callable[[str], Path]) -> None:
    directory = checkpoint_dir("llama")
    with LLM(directory, stages=1, in_process=True, draft=FaultySource(), schedule="flow") as llm:
        stream = llm.stream((COMMITS, *PROMPT), SamplingParams(24))
        got = next(stream).token_ids
        with pytest.raises(RequestError, match="a bug in commit"):
            got += [token_id for chunk in stream for token_id in chunk.token_ids]
    ((*expected,),) = solo(directory, [((COMMITS, *PROMPT), SamplingParams(24))])
    assert got and got == expected[: len(got)]


def test_a_request_that_fails_before_it_begins_leaves_no_cache_behind(checkpoint_dir: Callable[[str], Path]) -> None:
    """It had taken an earlier request's cache over, and nobody told the workers that it did not want it."""
    prompt = (OPENS, *PROMPT, *PROMPT)
    with engine_of(checkpoint_dir("llama"), stages=2, in_process=True, draft=FaultySource(), schedule="flow") as engine:
        first = engine.submit(prompt, SamplingParams(8), schedule="ar")
        while not first.is_finished or engine._driver.num_open:
            engine.step()
        workers = workers_of(engine)
        assert all(worker.num_cached == 1 for worker in workers)
        failing = engine.submit(prompt, SamplingParams(8))
        other = engine.submit(PROMPT, SamplingParams(8), schedule="ar")
        while not (failing.is_finished and other.is_finished) or engine._driver.num_open:
            engine.step()
        assert isinstance(failing.error, RequestError)
        assert all(list(worker._requests._cached) == [other.request.request_id] for worker in workers)


class FaultyStage:
    """A stage that cannot run rows of a marked token."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.is_first, self.is_last = stage.is_first, stage.is_last
        self.hidden_size, self.dtype = stage.hidden_size, stage.dtype
        self.weights_bytes, self.slot_bytes = stage.weights_bytes, stage.slot_bytes
        self.num_rows: list[int] = []  # of each forward

    def open_cache(self, root_id: int | None = None) -> StageCache:
        return self._stage.open_cache(root_id)

    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[torch.Tensor | None]:
        self.num_rows.append(sum(len(part.slots) for part in parts))
        yield None
        if any(self.is_first and bool((part.inputs == SENDS).any()) for part in parts):
            raise MemoryError("no memory for this one")
        yield from self._stage.steps(parts, watch)


def test_in_a_forward_that_requests_share_only_the_faulty_one_fails(checkpoint_dir: Callable[[str], Path]) -> None:
    directory = checkpoint_dir("llama")
    params = [SamplingParams(12), SamplingParams(12, 0.8, seed=4)]
    expected = solo(directory, [((i, *PROMPT), each) for i, each in enumerate(params)])
    pump = Pump(directory, 2, "ngram", patience_s=None, wrap_stage=FaultyStage)
    good = [pump.submit((i, *PROMPT), each) for i, each in enumerate(params)]
    bad = pump.submit((SENDS, *PROMPT), SamplingParams(12))
    with pytest.raises(RequestError, match="worker 1 cannot go on with this request: MemoryError"):
        pump.run()
    assert bad.error is not None and [generation.output_ids for generation in good] == expected
    assert max(pump.stages[0].num_rows) > len(PROMPT) + 1, "no forward was shared"


def test_a_worker_survives_what_contradicts_what_came_before(checkpoint_dir: Callable[[str], Path]) -> None:
    pump = Pump(checkpoint_dir("llama"), 1)
    generation = pump.submit(PROMPT, SamplingParams(8))
    link = pump.network.waiting()[0]
    opened, segment = pump.network.take(link), pump.network.take(link)
    worker = pump.workers[0]
    assert isinstance(segment, Segment)
    sends = [*worker.on_message(opened), *worker.on_message(segment), *worker.on_message(segment)]
    while (more := worker.on_idle()) is not None:
        sends += more
    (failed,) = [send.message for send in sends if isinstance(send.message, Failed)]
    assert "sent twice" in failed.text and failed.request_id == generation.request.request_id


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_end_a_request_with_the_layers_that_made_them(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, damage: float
) -> None:
    """They gave token 0 for ever, without an error."""
    directory = shutil.copytree(checkpoint_dir("llama"), tmp_path / "damaged")
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if (weight := tensors.get("model.layers.3.mlp.down_proj.weight")) is not None:
            weight[0, 0] = damage
            save_file(tensors, path, metadata={"format": "pt"})
    with LLM(directory, partition="0:2,2:4,4:6", in_process=True, draft="ngram") as llm:
        for temperature in (0.0, 0.8):
            with pytest.raises(NumericalError, match=r"hidden states .* not finite.*float32.*after layers 2:4"):
                llm.generate(PROMPT, SamplingParams(8, temperature))


# --- cancelling a prompt ---


def test_cancelling_reaches_a_prompt_within_one_chunk(checkpoint_dir: Callable[[str], Path]) -> None:
    num_stages, chunk = 3, 8
    pipeline = PipelineConfig(prefill_chunk=chunk)
    pump = Pump(checkpoint_dir("llama"), num_stages, pipeline=pipeline, patience_s=None, wrap_stage=FaultyStage)
    choose = Random(0).randrange
    generation = pump.submit([i % 90 for i in range(240)], SamplingParams(8))
    while generation.num_prompt_verified < 5 * chunk:
        pump.run(choose, max_events=1, is_final=False)
    before = [sum(stage.num_rows) for stage in pump.stages]
    in_flight = sum(len(ids) for ids in generation.in_flight.values())
    assert in_flight <= (num_stages + 1) * chunk, "more chunks are under way than fill the pipeline"
    pump.cancel(generation)
    pump.run()
    after = [sum(stage.num_rows) for stage in pump.stages]
    assert all(b - a <= chunk for a, b in zip(before, after, strict=True))


def test_a_prompt_that_is_cancelled_before_it_is_opened_is_not_computed(checkpoint_dir: Callable[[str], Path]) -> None:
    """The end overtakes the beginning, on a connection of its own."""
    pump = Pump(checkpoint_dir("llama"), 2, pipeline=PipelineConfig(prefill_chunk=8), wrap_stage=FaultyStage)
    pump.cancel(pump.submit([i % 90 for i in range(240)], SamplingParams(8)))
    for link in pump.network.waiting():
        if link.kind == "control":
            pump.deliver(link)
    pump.run()
    assert not any(stage.num_rows for stage in pump.stages)


@pytest.mark.parametrize("schedule", ["ar", "flow", "lockstep", "pipedec", "serial", "auto"])
def test_a_long_prompt_in_many_chunks_gives_the_same_text(checkpoint_dir: Callable[[str], Path], schedule: str) -> None:
    directory, prompt = checkpoint_dir("mistral"), tuple(i * i % 96 for i in range(100))
    params = SamplingParams(16, 0.7, seed=2)
    pump = Pump(directory, 2, "ngram", schedule, pipeline=PipelineConfig(prefill_chunk=4))
    generation = pump.submit(prompt, params)
    pump.run()
    assert [generation.output_ids] == solo(directory, [(prompt, params)])


# --- room in the caches ---


def test_requests_start_when_there_is_likely_room_and_grow(checkpoint_dir: Callable[[str], Path]) -> None:
    config = EngineConfig(kv_slots=500, likely_tokens=16)
    with engine_of(
        checkpoint_dir("llama"), stages=2, in_process=True, schedule="ar", config=config, draft="none"
    ) as engine:
        for _ in range(2):
            engine.submit(PROMPT, SamplingParams(engine.room(len(PROMPT))))
        engine.step()
        assert engine.status().num_running == 2, "nobody waits while the caches are nearly empty"
        assert engine.status().num_slots_held < 500


@pytest.mark.parametrize(("schedule", "draft"), [("flow", "eagle"), ("lockstep", "ngram"), ("auto", "ngram")])
def test_who_has_to_give_way_goes_on_later_with_the_same_text(
    checkpoint_dir: Callable[[str], Path], schedule: str, draft: str
) -> None:
    """Six that need 80 slots and more share 260; each gets the tokens, and log-probabilities, that it gets alone."""
    directory = checkpoint_dir("qwen3")
    jobs = [
        ((i, *PROMPT), SamplingParams(60, i % 2 * 0.8, seed=i, frequency_penalty=i % 3 * 0.2, num_logprobs=1))
        for i in range(6)
    ]
    expected = solo(directory, jobs)
    config = EngineConfig(kv_slots=260, likely_tokens=4)
    with engine_of(
        directory,
        stages=2,
        in_process=True,
        schedule=schedule,
        draft=directory / "draft" if draft == "eagle" else draft,
        schedule_config=ScheduleConfig(flow=SMALL_TREE, lockstep=LockstepConfig(SMALL_TREE, expand_size=8)),
        config=config,
    ) as engine:
        started = [engine.submit(*job) for job in jobs]
        while not all(job.is_finished for job in started):
            engine.step()
            assert engine.status().num_slots_held <= 260
            for worker in workers_of(engine):
                requests = worker._requests
                caches = [*requests._cached.values(), *(request.cache for request in requests._open.values())]
                # A segment of a lock-step schedule may keep its request's end waiting for a moment.
                assert schedule == "lockstep" or sum(cache.slots.limit for cache in caches) <= 260
                assert all(cache.slots.capacity <= max(256, cache.slots.limit) for cache in caches)
        assert [job.output_ids for job in started] == expected
        generations = [job.generation for job in started if job.generation is not None]
        assert sum(generation.stats.preemptions for generation in generations) > 0
        assert generations[0].stats.preemptions == 0, "the oldest one always goes on"
        for job in started:
            assert [logprobs.token_id for logprobs in job.output_logprobs] == job.output_ids
            assert all(isinstance(each, TokenLogprobs) and math.isfinite(each.logprob) for each in job.output_logprobs)


def test_a_request_that_waits_to_go_on_can_be_cancelled(checkpoint_dir: Callable[[str], Path]) -> None:
    config = EngineConfig(kv_slots=360, likely_tokens=4)
    with engine_of(
        checkpoint_dir("llama"),
        stages=1,
        in_process=True,
        schedule="ar",
        draft="none",
        config=config,
    ) as engine:
        jobs = [engine.submit(PROMPT, SamplingParams(180)) for _ in range(2)]
        while not (jobs[1].output_ids and engine.status().num_waiting):
            engine.step()
        engine.cancel(jobs[1])
        assert engine.status().num_waiting == 0 and jobs[1].is_finished
        while not jobs[0].is_finished:
            engine.step()
        assert engine.status().num_slots_held == 0 and len(jobs[0].output_ids) == 180


def test_the_caches_of_a_worker_are_free_as_soon_as_nobody_holds_it(checkpoint_dir: Callable[[str], Path]) -> None:
    """A forward that was interrupted held its worker, and so a lost session's caches, until garbage was collected."""
    pump = Pump(checkpoint_dir("llama"), 1, patience_s=0.0)
    pump.submit(PROMPT, SamplingParams(8))
    worker, link = pump.workers.pop(), pump.network.waiting()[0]
    for _ in range(2):
        worker.on_message(pump.network.take(link))
    while worker._running is None:
        worker.on_idle()
    held = weakref.ref(worker)
    gc.disable()
    try:
        del worker
        assert held() is None
    finally:
        gc.enable()
