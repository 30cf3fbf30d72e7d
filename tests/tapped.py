"""What the exactness of all heads that read the target's layers is tried with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from flowspec.config import PipelineConfig
from flowspec.core import SamplingParams
from pump import Pump, prompt_of

NUM_TOKENS = 20
TEMPERATURES = (0.0, 0.8)
SMALL = PipelineConfig(segment_len=5, prefill_chunk=7)  # so that prompts and trees come in several segments

Other = TypeVar("Other", int, str)

# Temperature, prompt length, number of tokens -> what ``ar`` gives on one stage.
Plain: TypeAlias = Callable[[float, int, int], list[int]]


def params_at(temperature: float, max_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=11)


def in_turn(
    schedules: Sequence[str], others: Sequence[Other], temperatures: Sequence[float] = TEMPERATURES
) -> list[tuple[str, Other, float]]:
    """Every pair, at one temperature: each of either list meets both."""
    return [
        (schedule, other, temperatures[(i + j) % len(temperatures)])
        for i, schedule in enumerate(schedules)
        for j, other in enumerate(others)
    ]


def check_that_a_kept_prompt_is_taken_over(directory: Path, draft: str) -> None:
    """By a request that begins with the text of one that has ended."""
    prompt = prompt_of(20)
    pump = Pump(directory, 3, draft, pipeline=SMALL, keeps_caches=True)
    first = pump.submit(prompt, params_at(0.0))
    pump.run()
    longer = [*prompt, *first.output_ids[:10], 5, 1]
    second = pump.submit(longer, params_at(0.0))
    pump.run()
    assert second.num_cached > len(prompt)
    alone = Pump(directory, 1, "none", "ar")
    expected = alone.submit(longer, params_at(0.0))
    alone.run()
    assert second.output_ids == expected.output_ids


class Recorder:
    """A head, and the features that it was given of the prompt and the accepted tokens, in their order."""

    def __init__(self, head: Any) -> None:
        self._head = head
        self.config, self.embedding, self.fed_back = head.config, head.embedding, head.fed_back
        self.seen: list[Tensor] = []

    def __call__(self, *arguments: Any) -> Tensor:
        return self._head(*arguments)

    def features_of(self, read: Tensor) -> Tensor:
        features = self._head.features_of(read)
        self.seen.append(features)
        return features
