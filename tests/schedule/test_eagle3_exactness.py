"""With an EAGLE-3 head too, every schedule and every number of stages gives the tokens of plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flowspec.config import ScheduleConfig
from flowspec.schedule.catalogue import AUTO, SCHEDULES, make_schedule
from pump import Pump, prompt_of
from tapped import NUM_TOKENS, SMALL, Plain, Recorder, check_that_a_kept_prompt_is_taken_over, in_turn, params_at
from tiny_eagle3 import Eagle3Form, Reference, make_weights


@pytest.mark.parametrize(("schedule", "num_stages", "temperature"), in_turn([*SCHEDULES, AUTO], (1, 2, 3)))
def test_tokens_are_those_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path],
    plain: Plain,
    schedule: str,
    num_stages: int,
    temperature: float,
) -> None:
    pump = Pump(checkpoint_dir("qwen3"), num_stages, "eagle3", schedule, pipeline=SMALL)
    generation = pump.submit(prompt_of(20), params_at(temperature))
    pump.run()
    assert generation.output_ids == plain(temperature, 20, NUM_TOKENS)
    assert bool(generation.stats.drafted) == (schedule != "ar")


@pytest.mark.parametrize("prompt_len", [1, 2, 3, 7, 8, 15])
def test_prompts_of_any_length_are_exact(checkpoint_dir: Callable[[str], Path], plain: Plain, prompt_len: int) -> None:
    pump = Pump(checkpoint_dir("qwen3"), 3, "eagle3", pipeline=SMALL)
    generation = pump.submit(prompt_of(prompt_len), params_at(0.0, 12))
    pump.run()
    assert generation.output_ids == plain(0.0, prompt_len, 12)


@settings(max_examples=8)
@given(st.randoms(use_true_random=False), st.sampled_from(["flow", "lockstep", "pipedec"]))
def test_any_order_of_events_gives_the_same_tokens(
    checkpoint_dir: Callable[[str], Path], plain: Plain, random: Random, schedule: str
) -> None:
    pump = Pump(checkpoint_dir("qwen3"), 3, "eagle3", schedule, pipeline=SMALL)
    generation = pump.submit(prompt_of(9), params_at(0.8, 12))
    pump.run(random.randrange)
    assert generation.output_ids == plain(0.8, 9, 12)


def test_several_requests_and_those_without_a_draft_share_forwards(checkpoint_dir: Callable[[str], Path]) -> None:
    prompts = [prompt_of(length, seed=length) for length in (4, 11, 18)]
    answers: list[list[list[int]]] = []
    for draft, num_stages in (("none", 1), ("eagle3", 3)):
        pump = Pump(checkpoint_dir("mistral"), num_stages, draft, "ar" if draft == "none" else "flow", pipeline=SMALL)
        generations = [pump.submit(prompt, params_at(0.0, 15)) for prompt in prompts]
        pump.make_schedule = lambda: make_schedule("ar", ScheduleConfig(pipeline=SMALL), 3)  # whatever the draft
        generations.append(pump.submit(prompts[0], params_at(0.8, 15)))
        pump.run()
        answers.append([generation.output_ids for generation in generations])
    assert answers[0] == answers[1]


def test_a_prompt_that_was_kept_is_taken_over_with_its_features(checkpoint_dir: Callable[[str], Path]) -> None:
    check_that_a_kept_prompt_is_taken_over(checkpoint_dir("qwen3"), "eagle3")


@pytest.mark.parametrize("schedule", ["flow", "serial", "lockstep"])
def test_the_draft_reads_the_features_of_the_text_and_of_nothing_else(
    checkpoint_dir: Callable[[str], Path], schedule: str
) -> None:
    """Whatever was pruned under way: in the end every token's features are transformers' own."""
    directory, form = checkpoint_dir("llama"), Eagle3Form("specforge")
    weights = make_weights(form, seed=1)
    pump = Pump(directory, 3, "eagle3", schedule, pipeline=SMALL)
    source: Any = pump.driver._source
    source.head = recorder = Recorder(source.head)
    prompt = prompt_of(20)
    generation = pump.submit(prompt, params_at(0.8))
    pump.run()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    seen = torch.cat(recorder.seen)
    text = torch.tensor([*prompt, *generation.output_ids])[: len(seen)]
    states = model(text[None], output_hidden_states=True).hidden_states
    reference = Reference(form, weights, model.model.embed_tokens.weight, model.lm_head.weight)
    expected = reference.fused([states[layer][0] for layer in form.tapped])
    assert len(seen) > len(prompt)
    torch.testing.assert_close(seen, expected, atol=1e-3, rtol=1e-3)
    assert generation.stats.accepted > 0
