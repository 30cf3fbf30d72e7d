"""The spine: every schedule, draft source and number of stages gives the tokens of the model alone.

The last family has every schedule with each draft, with each number of stages, and each draft with each number of
stages. Every other family has each schedule but the ablations, and each draft and number of stages among them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from flowspec.config import PipelineConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.schedule.catalogue import ABLATIONS, AUTO, SCHEDULES
from plain_sampling import filtered_logprobs
from pump import Pump, prompt_of
from tiny_models import FAMILIES, make_checkpoint, make_draft_head, plain_model

SPINE = FAMILIES[-1]
# Of prompts that the families soon answer with a token that was there: the n-gram draft has something to say.
PROMPT_SEEDS = {
    "llama": 2, "mistral": 2, "qwen2": 12, "gemma3_text": 10, "smollm3": 1, "phi3": 45, "granite": 2, "mixtral": 6,
    "qwen3_moe": 4, "mimo": 4, SPINE: 3,
}  # fmt: skip
DRAFTS = ("eagle", "ngram", "none")
STAGES = (1, 2, 3, 5)
SMALL = PipelineConfig(segment_len=5, prefill_chunk=7)  # so that prompts and trees come in several segments

# The other parts of flow need costs, which these runs have not; the simulator's tests have them.
LADDER = [name for name in ABLATIONS if name.startswith("lockstep") or name == "flow-no-hints"]

GreedyAnswer = Callable[[str], list[int]]


@functools.cache
def generate_greedily(directory: Path, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """transformers' own answer."""
    model = plain_model(directory)
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=num_tokens, do_sample=False
    )
    return output[0, len(prompt) :].tolist()


def num_tokens_of(family: str) -> int:
    return 24 if family == SPINE else 14


def family_prompt(family: str) -> list[int]:
    return prompt_of(20, PROMPT_SEEDS[family])


@pytest.fixture(scope="session")
def greedy_answer(checkpoint_dir: Callable[[str], Path]) -> GreedyAnswer:
    """To the family's prompt."""

    def get(family: str) -> list[int]:
        return generate_greedily(checkpoint_dir(family), tuple(family_prompt(family)), num_tokens_of(family))

    return get


def ladder() -> list[tuple[str, str, str, int]]:
    """Family, schedule, draft, stages."""
    schedules = [*SCHEDULES, AUTO, *LADDER]
    spine = [
        (SPINE, schedule, DRAFTS[(i + j) % len(DRAFTS)], num_stages)
        for i, schedule in enumerate(schedules)
        for j, num_stages in enumerate(STAGES)
    ]
    others = [
        (family, schedule, DRAFTS[(i + j) % len(DRAFTS)], STAGES[(i + j) % len(STAGES)])
        for i, family in enumerate(FAMILIES[:-1])
        for j, schedule in enumerate([*SCHEDULES, AUTO])
    ]
    return [*spine, *others]


def test_the_ladder_is_as_wide_as_it_says() -> None:
    spine = {rung[1:] for rung in ladder() if rung[0] == SPINE}
    schedules = {*SCHEDULES, AUTO, *LADDER}
    assert {(schedule, draft) for schedule, draft, _ in spine} == set(itertools.product(schedules, DRAFTS))
    assert {(schedule, num_stages) for schedule, _, num_stages in spine} == set(itertools.product(schedules, STAGES))
    assert {(draft, num_stages) for _, draft, num_stages in spine} == set(itertools.product(DRAFTS, STAGES))
    for family in FAMILIES[:-1]:
        _, *values = zip(*(rung for rung in ladder() if rung[0] == family), strict=True)
        assert [set(value) for value in values] == [{*SCHEDULES, AUTO}, set(DRAFTS), set(STAGES)]


@pytest.mark.parametrize(("family", "schedule", "draft", "num_stages"), ladder())
def test_greedy_text_is_that_of_transformers(
    checkpoint_dir: Callable[[str], Path],
    greedy_answer: GreedyAnswer,
    family: str,
    schedule: str,
    draft: str,
    num_stages: int,
) -> None:
    pump = Pump(checkpoint_dir(family), num_stages, draft, schedule, pipeline=SMALL)
    generation = pump.submit(family_prompt(family), SamplingParams(max_tokens=num_tokens_of(family)))
    pump.run()
    assert generation.output_ids == greedy_answer(family)
    assert generation.finish_reason == "length"
    assert bool(generation.stats.drafted) == (schedule != "ar" and draft != "none")
    if (family, draft) == (SPINE, "eagle") and schedule != "ar":
        assert generation.stats.accepted and generation.stats.restarts, "right guesses and wrong ones"


@pytest.mark.parametrize(
    ("family", "draft"),
    [*((SPINE, draft) for draft in DRAFTS), *((family, DRAFTS[i % 2]) for i, family in enumerate(FAMILIES[:-1]))],
)
def test_sampled_text_of_flow_is_that_of_plain_decoding_with_the_same_seed(
    checkpoint_dir: Callable[[str], Path], family: str, draft: str
) -> None:
    num_tokens = 16
    params = SamplingParams(max_tokens=num_tokens, temperature=0.8, top_k=20, top_p=0.95, seed=7)
    texts: list[list[int]] = []
    for schedule, num_stages in (("ar", 1), ("flow", 3)):
        pump = Pump(
            checkpoint_dir(family), num_stages, draft if schedule == "flow" else "none", schedule, pipeline=SMALL
        )
        generation = pump.submit(prompt_of(9), params)
        pump.run()
        texts.append(generation.output_ids)
    assert texts[0] == texts[1]
    assert len(texts[0]) == num_tokens


@pytest.mark.parametrize("prompt_len", [1, 2, 3, 7, 8, 15])
@pytest.mark.parametrize("draft", ["eagle", "ngram"])
def test_prompts_of_any_length_are_exact(checkpoint_dir: Callable[[str], Path], draft: str, prompt_len: int) -> None:
    directory, prompt = checkpoint_dir(SPINE), prompt_of(prompt_len)
    pump = Pump(directory, 3, draft, pipeline=SMALL)
    generation = pump.submit(prompt, SamplingParams(max_tokens=8))
    pump.run()
    assert generation.output_ids == generate_greedily(directory, tuple(prompt), 8)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 6])
def test_short_answers_end_exactly_at_their_limit(
    checkpoint_dir: Callable[[str], Path], greedy_answer: GreedyAnswer, max_tokens: int
) -> None:
    pump = Pump(checkpoint_dir("llama"), 2, "ngram")
    generation = pump.submit(family_prompt("llama"), SamplingParams(max_tokens=max_tokens))
    pump.run()
    assert generation.output_ids == greedy_answer("llama")[:max_tokens]


def test_several_requests_at_once_do_not_disturb_each_other(checkpoint_dir: Callable[[str], Path]) -> None:
    directory = checkpoint_dir("mistral")
    prompts = [prompt_of(length, seed=length) for length in (4, 11, 18)]
    pump = Pump(directory, 3, "eagle", pipeline=SMALL)
    generations = [pump.submit(prompt, SamplingParams(max_tokens=15)) for prompt in prompts]
    pump.run()
    assert [g.output_ids for g in generations] == [
        generate_greedily(directory, tuple(prompt), 15) for prompt in prompts
    ]


@pytest.mark.parametrize(
    "tree",
    [
        TreeConfig(top_k=1, depth=3, size=4, min_probability=0.0),
        TreeConfig(top_k=3, depth=2, size=7, min_probability=0.0),
    ],
    ids=str,
)
def test_the_tree_settings_change_nothing(
    checkpoint_dir: Callable[[str], Path], greedy_answer: GreedyAnswer, tree: TreeConfig
) -> None:
    # Segments of one row: siblings of the row are alive in the caches, and must not be seen.
    pump = Pump(checkpoint_dir("qwen2"), 3, "eagle", tree=tree, pipeline=PipelineConfig(segment_len=1))
    generation = pump.submit(family_prompt("qwen2"), SamplingParams(max_tokens=num_tokens_of("qwen2")))
    pump.run()
    assert generation.output_ids == greedy_answer("qwen2")


def test_samples_follow_the_exact_distribution(tmp_path: Path) -> None:
    """Two tokens from a vocabulary of 8, many seeds: chi-square against the model's own joint distribution.

    Twenty-five requests at a time, which share forwards; the third token keeps the pipeline busy behind the second.
    """
    sizes: dict[str, Any] = {"vocab_size": 8, "num_hidden_layers": 2, "initializer_range": 0.15}
    directory = make_checkpoint(tmp_path / "model", "llama", **sizes)
    make_draft_head(directory / "draft", vocab_size=8)
    prompt, num_seeds, num_at_once = [1, 5, 2, 1, 5, 2, 1], 500, 25
    pump = Pump(directory, 2, "eagle", tree=TreeConfig(top_k=3, depth=2, size=8, min_probability=0.0))
    generations = []
    for seed in range(num_seeds):
        params = SamplingParams(max_tokens=3, temperature=1.2, top_p=0.97, seed=seed)
        generations.append(pump.submit(prompt, params))
        if len(generations) % num_at_once == 0:
            pump.run()
    model = plain_model(directory)
    params = generations[0].request.params

    @torch.inference_mode()
    def next_probabilities(token_ids: list[int]) -> np.ndarray:
        return filtered_logprobs(model(torch.tensor([token_ids])).logits[0, -1], params).exp().numpy()

    first = next_probabilities(prompt)
    expected = np.stack([first[a] * next_probabilities([*prompt, a]) for a in range(8)]).ravel()
    counts = np.zeros(64)
    for generation in generations:
        a, b = generation.output_ids[:2]
        counts[8 * a + b] += 1
    assert counts[expected == 0].sum() == 0
    often = expected * num_seeds >= 5  # the rest is one class: chi-square wants five or more in each
    observed = [*counts[often], counts[~often].sum()]
    wanted = [*expected[often] * num_seeds, expected[~often].sum() * num_seeds]
    assert often.sum() > 10, "the test has lost its power"
    assert stats.chisquare(observed, wanted).pvalue > 1e-3
    assert sum(g.stats.accepted for g in generations) > num_seeds / 10, "drafts must have taken part"
