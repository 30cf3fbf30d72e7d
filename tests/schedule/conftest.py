"""Texts that several ladders are held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pump import Pump, prompt_of
from tapped import Plain, params_at


@pytest.fixture(scope="session")
def plain(checkpoint_dir: Callable[[str], Path]) -> Plain:
    """What ``ar`` gives on one stage: temperature, prompt length, number of tokens."""
    return _answers_of(checkpoint_dir("qwen3"))


@pytest.fixture(scope="session")
def plain_mimo(checkpoint_dir: Callable[[str], Path]) -> Plain:
    """As ``plain``, of the family that has MTP layers."""
    return _answers_of(checkpoint_dir("mimo"))


def _answers_of(directory: Path) -> Plain:
    answers: dict[tuple[float, int, int], list[int]] = {}

    def get(temperature: float, prompt_len: int, max_tokens: int) -> list[int]:
        key = temperature, prompt_len, max_tokens
        if key not in answers:
            pump = Pump(directory, 1, "none", "ar")
            generation = pump.submit(prompt_of(prompt_len), params_at(temperature, max_tokens))
            pump.run()
            answers[key] = generation.output_ids
        return answers[key]

    return get
