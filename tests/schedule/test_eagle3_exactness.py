"""With an EAGLE-3 head too, every schedule and every number of stages gives the tokens of plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from flowspec.config import PipelineConfig
from flowspec.core import SamplingParams
from flowspec.schedule.catalogue import AUTO, SCHEDULES
from pump import Pump, prompt_of

NUM_TOKENS = 24
SMALL = PipelineConfig(segment_len=5, prefill_chunk=7)  # so that prompts and trees come in several segments
TEMPERATURES = (0.0, 0.8)


def params_at(temperature: float, max_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=11)


@pytest.fixture(scope="session")
def plain(checkpoint_dir: Callable[[str], Path]) -> Callable[[float, int, int], list[int]]:
    """What ``ar`` gives on one stage: temperature, prompt length, number of tokens."""
    answers: dict[tuple[float, int, int], list[int]] = {}

    def get(temperature: float, prompt_len: int, max_tokens: int) -> list[int]:
        key = temperature, prompt_len, max_tokens
        if key not in answers:
            pump = Pump(checkpoint_dir("qwen3"), 1, "none", "ar")
            generation = pump.submit(prompt_of(prompt_len), params_at(temperature, max_tokens))
            pump.run()
            answers[key] = generation.output_ids
        return answers[key]

    return get


@pytest.mark.parametrize(
    ("schedule", "num_stages", "temperature"), list(itertools.product([*SCHEDULES, AUTO], (1, 2, 3), TEMPERATURES))
)
def test_tokens_are_those_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path],
    plain: Callable[[float, int, int], list[int]],
    schedule: str,
    num_stages: int,
    temperature: float,
) -> None:
    pump = Pump(checkpoint_dir("qwen3"), num_stages, "eagle3", schedule, pipeline=SMALL)
    generation = pump.submit(prompt_of(20), params_at(temperature))
    pump.run()
    assert generation.output_ids == plain(temperature, 20, NUM_TOKENS)
    assert bool(generation.stats.drafted) == (schedule != "ar")
