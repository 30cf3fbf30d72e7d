"""Requests that share the pipeline: each gives the tokens that it gives alone, whatever the others do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import engine_of, run
from flowspec.bench.load import run_load
from flowspec.bench.runner import PairSpec
from flowspec.bench.study import Study
from flowspec.config import EngineConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import FINAL, LayerRange, SamplingParams
from flowspec.draft.ngram import NgramSource
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Experiment
from flowspec.emulation.pairs import SyntheticPair
from flowspec.emulation.simulator import simulate, simulate_load
from flowspec.errors import UsageError
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import Part, forward
from flowspec.model.torch_stage import TorchStage
from flowspec.request.generation import Generation
from flowspec.request.prefix_cache import CacheEntry
from flowspec.request.slot_budget import MIN_CACHED, SlotBudget
from flowspec.wire.messages import Failed, Open, Result, Segment
from flowspec.wire.transport import DRIVER
from flowspec.worker.actor import Worker
from pump import Pump

PROMPTS = [[1, 4, 2, 1, 4, 2, 3], [5, 6], [7, 8, 9, 1, 2], [1, 4, 2, 1]]
TREE = TreeConfig(top_k=3, depth=4, max_depth=6, size=20, min_probability=0.0)
PIPELINE = PipelineConfig(segment_len=3, prefill_chunk=4)
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def alone(checkpoint_dir: Callable[[str], Path]) -> Callable[[str, list[int], SamplingParams], list[int]]:
    """The plain tokens of one request on one stage."""
    known: dict[object, list[int]] = {}

    def tokens(family: str, prompt: list[int], params: SamplingParams) -> list[int]:
        key = (family, tuple(prompt), params)
        if key not in known:
            pump = Pump(checkpoint_dir(family), 1, schedule="ar")
            generation = pump.submit(prompt, params)
            pump.run()
            known[key] = generation.output_ids
        return known[key]

    return tokens


@pytest.mark.parametrize(  # each schedule with two families, each family with two schedules
    ("schedule", "family"),
    [
        (schedule, family)
        for i, schedule in enumerate(["flow", "serial", "lockstep", "auto"])
        for j, family in enumerate(["llama", "mistral", "qwen2", "qwen3"])
        if (i + j) % 2 == 0
    ],
)
def test_requests_at_once_give_the_tokens_that_they_give_alone(
    checkpoint_dir: Callable[[str], Path], alone: Callable[..., list[int]], family: str, schedule: str
) -> None:
    pump = Pump(checkpoint_dir(family), 3, "eagle", schedule, TREE, PIPELINE)
    generations = [pump.submit(prompt, PARAMS) for prompt in PROMPTS]
    pump.run()
    assert [g.output_ids for g in generations] == [alone(family, prompt, PARAMS) for prompt in PROMPTS]
    shared = [t.num_shared > t.num_rows for g in generations for timings in g.stats.timings for t in timings]
    assert any(shared) or schedule == "lockstep", "no forward was shared"


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), num_stages=st.integers(1, 3))
def test_any_order_with_requests_coming_going_and_reusing_caches_gives_the_same_tokens(
    checkpoint_dir: Callable[[str], Path], alone: Callable[..., list[int]], seed: int, num_stages: int
) -> None:
    random = Random(seed)
    pump = Pump(checkpoint_dir("qwen2"), num_stages, "eagle", "flow", TREE, PIPELINE, keeps_caches=True)
    texts: list[list[int]] = [[1 + i % 7 for i in range(2 * MIN_CACHED)]]
    for _ in range(3):
        running: list[tuple[Generation, list[int], SamplingParams]] = []
        for _ in range(random.randint(1, 3)):
            # The next turn of some chat, or the same one anew: it begins like a text that was computed before.
            prompt = [*random.choice(texts), random.randrange(1, 9)]
            params = SamplingParams(random.randint(1, 8), random.choice([0.0, 0.8]), seed=random.randrange(100))
            running.append((pump.submit(prompt, params), prompt, params))
        victim = random.choice(running)[0] if random.random() < 0.5 else None

        def choose(num: int, victim: Generation | None = victim) -> int:
            if victim is not None and not victim.is_finished and random.random() < 0.02:
                pump.network.post(DRIVER, pump.driver.cancel(victim))
            return random.randrange(num)

        pump.run(choose)
        for generation, prompt, params in running:
            expected = alone("qwen2", prompt, params)
            if generation is victim:
                assert generation.output_ids == expected[: len(generation.output_ids)]
            else:
                assert generation.output_ids == expected
            texts.append([*prompt, *generation.output_ids])


@pytest.mark.parametrize("draft", ["eagle", "ngram", "none"])
def test_the_next_turn_of_a_chat_computes_only_what_is_new(
    checkpoint_dir: Callable[[str], Path], alone: Callable[..., list[int]], draft: str
) -> None:
    pump = Pump(checkpoint_dir("llama"), 2, draft, "flow", TREE, PIPELINE, keeps_caches=True)
    prompt = [1 + i % 9 for i in range(40)]
    for _ in range(4):
        generation = pump.submit(prompt, PARAMS)
        sent = []
        while links := pump.network.waiting():
            sent.append(pump.network.take(links[0]))
        opened = next(message for message in sent if isinstance(message, Open))
        num_rows = sum(len(message.node_ids) for message in sent if isinstance(message, Segment))
        for message in sent:
            pump.workers[0].on_message(message)
        pump.run()
        assert generation.output_ids == alone("llama", prompt, PARAMS)
        if opened.cached_by is not None:
            assert opened.num_cached >= len(prompt) - 6 and num_rows == len(prompt) - opened.num_cached
        assert (opened.cached_by is not None) == (len(prompt) > 40), (
            "only the first turn has nobody whose cache it could reuse"
        )
        assert all(worker.num_cached == 1 for worker in pump.workers)
        prompt = [*prompt, *generation.output_ids, 3, 5, 2]


def test_a_request_takes_over_what_one_with_another_schedule_has_left(checkpoint_dir: Callable[[str], Path]) -> None:
    """It failed: the draft beside n-grams, which ``flow`` has, was taken for one without."""
    config, prompt = EngineConfig(kv_slots=600), [1 + i % 9 for i in range(40)]
    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, config=config) as engine:
        outputs = []
        for schedule in ("flow", "serial", "flow", "ar"):
            job = engine.submit(prompt, SamplingParams(max_tokens=6), schedule)
            run(engine, [job])
            assert job.error is None and (job.num_cached > 0) == bool(outputs)
            outputs.append(job.output_ids)
    assert outputs == [outputs[0]] * 4


def test_a_request_without_a_draft_reuses_one_with_a_draft_but_not_the_other_way_round(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    left = CacheEntry(1, tuple(range(30)), None)
    assert left.prefix_for(range(40), needs_features=False).num_cached == 29
    assert left.prefix_for(range(40), needs_features=True).num_cached == 0
    assert left.prefix_for(range(20), needs_features=False).num_cached == 18, (
        "the root and the token before it run again"
    )
    assert left.prefix_for([5], needs_features=False).num_cached == 0


def test_a_cache_that_is_not_kept_cannot_be_taken_over(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = Pump(checkpoint_dir("llama"), 1).workers[0]
    worker.on_message(Open(1, 0, 5, [], cached_by=0, num_cached=3))
    ((_, failed),) = [(send.route, send.message) for send in worker.on_idle() or []]
    assert isinstance(failed, Failed) and failed.request_id == 1 and "is not kept" in failed.text


def test_outputs_of_layers_that_a_worker_does_not_return_are_refused_at_both_ends(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    worker = Pump(checkpoint_dir("llama"), 1).workers[0]
    worker.on_message(Open(1, 0, 5, [2, FINAL]))
    ((_, failed),) = [(send.route, send.message) for send in worker.on_idle() or []]
    assert isinstance(failed, Failed) and failed.request_id == 1 and "layers [2, -1]" in failed.text
    source = NgramSource()
    source.feature_layers = (2, 3)
    with pytest.raises(UsageError, match=r"draft ngram reads the layers \[2, 3\], and these workers give it none"):
        Pump(checkpoint_dir("llama"), 1, source)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_shared_forward_gives_each_request_its_own_hidden_states(
    checkpoint_dir: Callable[[str], Path], family: str
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(family))
    stage = TorchStage.load(checkpoint, LayerRange(0, checkpoint.num_layers), "float32", "cpu")
    lengths, parts, expected = (5, 1, 17), [], []
    for seed, length in enumerate(lengths):
        inputs = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, 20 + length))
        for is_shared in (False, True):
            cache = stage.open_cache()
            forward(stage, inputs[:20], cache.slots.append_prefix(range(20)), cache)
            part = Part(inputs[20:], cache.slots.append_prefix(range(20, 20 + length)), cache)
            if is_shared:
                parts.append(part)
            else:
                expected.append(forward(stage, *part))
    *_, hidden = stage.steps(parts)
    assert hidden is not None
    for ours, theirs in zip(hidden.split(lengths), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rows_that_cost_too_much_wait_for_a_forward_of_their_own(checkpoint_dir: Callable[[str], Path]) -> None:
    pump = Pump(checkpoint_dir("llama"), 1)
    pump.workers[0] = worker = Worker(
        TorchStage.load(Checkpoint.open(checkpoint_dir("llama")), LayerRange(0, 6), "float32", "cpu"),
        1,
        time.perf_counter,
        forward_s=lambda num_rows: 1 + num_rows / 10,
    )
    for prompt in ([1, 2, 3], [4, 5], list(range(1, 14)), [6]):
        pump.submit(prompt, PARAMS)
    messages = []
    while links := pump.network.waiting():
        messages.append(pump.network.take(links[0]))
    for message in sorted(messages, key=lambda message: not isinstance(message, Open)):
        worker.on_message(message)
    results: dict[int, Result] = {}
    while (sends := worker.on_idle()) is not None:
        results |= {send.message.request_id: send.message for send in sends if isinstance(send.message, Result)}
    shared = {request_id: result.timings[0].num_shared for request_id, result in results.items()}
    assert shared == {0: 6, 1: 6, 2: 13, 3: 6}, "13 more rows would cost more than half of what they cost alone"


# --- memory --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.integers(0, 3)), max_size=30), st.integers(60, 150))
def test_a_budget_is_never_overdrawn_and_nothing_is_forgotten_twice(
    requests: list[tuple[int, bool, int]], total: int
) -> None:
    budget, running, kept = SlotBudget(total), {}, set[int]()
    for request_id, (num_slots, keeps, kind) in enumerate(requests):
        prompt = [kind] * 40
        while not budget.has_room(num_slots):
            ended, left = running.popitem()
            gone = budget.end(ended, left)
            kept |= {ended} if left is not None else set()
            assert set(gone) <= kept
            kept -= set(gone)
        cached, gone = budget.take(request_id, num_slots, prompt, False)
        assert set(gone) <= kept and cached.request_id not in gone
        if cached.request_id is not None:
            assert cached.request_id in kept
            kept.remove(cached.request_id)
        kept -= set(gone)
        running[request_id] = CacheEntry(request_id, tuple(prompt), None) if keeps else None
        assert budget.num_held + budget.num_cached <= total


def test_a_request_that_can_never_fit_is_refused_and_one_that_does_not_fit_yet_waits(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    with engine_of(
        checkpoint_dir("llama"), stages=2, in_process=True, schedule="ar", config=EngineConfig(kv_slots=330)
    ) as engine:
        with pytest.raises(UsageError, match="KV caches"):
            engine.submit([1, 2, 3], SamplingParams(max_tokens=500))
        jobs = [engine.submit([1, 2, 3], SamplingParams(max_tokens=20)) for _ in range(3)]
        seen = set()
        while not all(job.is_finished for job in jobs):
            engine.step()
            seen.add((engine.status().num_running, engine.status().num_waiting))
            assert engine.status().num_slots_held <= 330
        assert (1, 2) in seen and jobs[0].output_ids == jobs[1].output_ids == jobs[2].output_ids
        waiting = [engine.submit([1, 2, 3], PARAMS) for _ in range(2)]
        engine.cancel(waiting[1])
        assert waiting[1].is_finished and engine.status().num_waiting == 1


def test_the_number_of_requests_at_once_is_bounded(checkpoint_dir: Callable[[str], Path]) -> None:
    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, config=EngineConfig(max_running=2)) as engine:
        jobs = [engine.submit([1, 2, i + 1], PARAMS) for i in range(5)]
        most = 0
        while not all(job.is_finished for job in jobs):
            engine.step()
            most = max(most, engine.status().num_running)
        assert most == 2


# --- throughput, in virtual time -----------------------------------------------------------------------------------


def test_eight_clients_of_a_simulated_cluster_get_two_and_a_half_times_the_tokens_of_one() -> None:
    cluster = ClusterDescription.load(Path(__file__).parents[2] / "clusters" / "7b-nano-150m.toml")
    experiment = Experiment(cluster, ScheduleConfig(), SamplingParams(48))
    prompts = [f"prompt {i}" for i in range(8)]
    study = Study(experiment, PairSpec(), ["flow", "auto"], prompts, jobs=1)
    results = run_load(study, [1, 8], lambda done: None)
    for one, eight in (results[:2], results[2:]):
        assert eight.tokens_per_s > 2.5 * one.tokens_per_s
        assert eight.ttft_ms < 3 * one.ttft_ms


def test_simulated_clients_with_a_seed_get_what_they_get_alone() -> None:
    cluster = ClusterDescription.load(Path(__file__).parents[2] / "clusters" / "7b-agx-1g.toml")
    experiment = Experiment(cluster, ScheduleConfig(), SamplingParams(24, 0.9, seed=3))
    pair = SyntheticPair("eagle1")
    prompts = [(index, f"prompt {index}") for index in range(5)]
    together = {record.index: record.token_ids for record in simulate_load(experiment, pair, "flow", prompts, 5)}
    assert together == {record.index: record.token_ids for record in simulate(experiment, pair, "ar", prompts)}
