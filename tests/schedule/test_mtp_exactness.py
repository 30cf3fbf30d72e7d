"""With a model's own MTP layer too, every schedule and every number of stages gives the tokens of plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.schedule.catalogue import AUTO, SCHEDULES
from pump import Pump, prompt_of
from tapped import NUM_TOKENS, SMALL, Plain, Recorder, check_that_a_kept_prompt_is_taken_over, in_turn, params_at
from tiny_models import plain_model


@pytest.mark.parametrize(("schedule", "num_stages", "temperature"), in_turn([*SCHEDULES, AUTO], (1, 2, 3)))
def test_tokens_are_those_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path], plain_mimo: Plain, schedule: str, num_stages: int, temperature: float
) -> None:
    pump = Pump(checkpoint_dir("mimo"), num_stages, "mtp", schedule, pipeline=SMALL)
    generation = pump.submit(prompt_of(20), params_at(temperature))
    pump.run()
    assert generation.output_ids == plain_mimo(temperature, 20, NUM_TOKENS)
    assert bool(generation.stats.drafted) == (schedule != "ar")


@pytest.mark.parametrize("prompt_len", [1, 2, 3, 7, 8, 15])
def test_prompts_of_any_length_are_exact(
    checkpoint_dir: Callable[[str], Path], plain_mimo: Plain, prompt_len: int
) -> None:
    pump = Pump(checkpoint_dir("mimo"), 3, "mtp", pipeline=SMALL)
    generation = pump.submit(prompt_of(prompt_len), params_at(0.0, 12))
    pump.run()
    assert generation.output_ids == plain_mimo(0.0, prompt_len, 12)


@settings(max_examples=8)
@given(st.randoms(use_true_random=False), st.sampled_from(["flow", "lockstep", "pipedec"]))
def test_any_order_of_events_gives_the_same_tokens(
    checkpoint_dir: Callable[[str], Path], plain_mimo: Plain, random: Random, schedule: str
) -> None:
    pump = Pump(checkpoint_dir("mimo"), 3, "mtp", schedule, pipeline=SMALL)
    generation = pump.submit(prompt_of(9), params_at(0.8, 12))
    pump.run(random.randrange)
    assert generation.output_ids == plain_mimo(0.8, 9, 12)


def test_a_prompt_that_was_kept_is_taken_over(checkpoint_dir: Callable[[str], Path]) -> None:
    check_that_a_kept_prompt_is_taken_over(checkpoint_dir("mimo"), "mtp")


@pytest.mark.parametrize("schedule", ["flow", "serial", "lockstep"])
def test_the_draft_reads_the_hidden_states_of_the_text_and_of_nothing_else(
    checkpoint_dir: Callable[[str], Path], schedule: str
) -> None:
    """Whatever was pruned under way: in the end it has every token's, from before the model's last norm."""
    directory = checkpoint_dir("mimo")
    pump = Pump(directory, 3, "mtp", schedule, pipeline=SMALL)
    source: Any = pump.driver._source
    norm = source.head.hidden_layernorm
    source.head = recorder = Recorder(source.head)
    prompt = prompt_of(20)
    generation = pump.submit(prompt, params_at(0.8))
    pump.run()
    seen = torch.cat(recorder.seen)
    text = torch.tensor([*prompt, *generation.output_ids])[: len(seen)]
    before: list[torch.Tensor] = []
    model = plain_model(directory)
    model.model.norm.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0][0]))
    with torch.inference_mode():
        model(text[None])
        expected = norm(before[0])
    assert len(seen) > len(prompt)
    torch.testing.assert_close(seen, expected, atol=1e-3, rtol=1e-3)
    assert generation.stats.accepted > 0
