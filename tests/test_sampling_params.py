"""Penalties, bias, min-p, log-probabilities and stop tokens: what others compute, in every schedule."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chains import add_path
from flowspec.config import PipelineConfig
from flowspec.core import SamplingParams
from flowspec.draft.base import Accepted, DraftSource
from flowspec.filters import kept_ids
from flowspec.request.generation import Generation
from flowspec.request.request import Request
from flowspec.request.verifier import Verdict
from flowspec.sampling import Sampler, token_logprobs
from flowspec.tree import DraftTree, Ints
from flowspec.wire.transport import DRIVER
from plain_sampling import filtered_logprobs, gumbel_noise
from pump import Pump, prompt_of

NUM_TOKENS = 24
PROMPT = prompt_of(20)
SMALL = PipelineConfig(segment_len=5, prefill_chunk=7)
BIAS = (*((token_id, 4.0) for token_id in range(5, 13)), (13, -100.0))
NO_TEXT: Any = torch.zeros(1, 1, dtype=torch.long)  # for processors that do not look at it

# The one keeps the text from repeating itself; the other makes it, so that n-grams are accepted.
REPEL = SamplingParams(
    NUM_TOKENS, 0.8, top_p=0.9, top_k=30, seed=7, min_p=0.02, logit_bias=BIAS, num_logprobs=5,
    presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.2,
)  # fmt: skip
ATTRACT = replace(REPEL, presence_penalty=-1.0, frequency_penalty=-0.3, repetition_penalty=0.8)


class KnownSource:
    """Knows the text in advance, and guesses four tokens at once."""

    name = "known"
    steady_steps = 1
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> KnownDraft:
        return KnownDraft(self._text, len(prompt_ids) - 1)


class KnownDraft:
    def __init__(self, text: Sequence[int], prefix_len: int) -> None:
        self._text, self._prefix_len = text, prefix_len

    def read_prompt(self, node_ids: Sequence[int], features: torch.Tensor) -> None: ...

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._prefix_len += len(accepted.token_ids)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        tree.staleness[rows] = 0
        start = self._prefix_len + int(tree.depths[rows[0]]) + 1
        guesses = list(self._text[start : start + 4])
        add_path(tree, int(rows[0]), guesses, [-0.1] * len(guesses))
        return True


def run(
    directory: Path,
    params: SamplingParams,
    schedule: str = "ar",
    num_stages: int = 1,
    draft: str | DraftSource = "none",
    eos_ids: frozenset[int] = frozenset(),
) -> Generation:
    pump = Pump(directory, num_stages, draft, schedule, pipeline=SMALL)
    generation, sends = pump.driver.submit(Request(0, tuple(PROMPT), params, eos_ids), pump.make_schedule())
    pump.network.post(DRIVER, sends)
    pump.run()
    return generation


@functools.cache
def plain_text_of(directory: Path, params: SamplingParams) -> Generation:
    return run(directory, params)


def whole_model_logits(directory: Path, output_ids: list[int]) -> torch.Tensor:
    """[tokens, V]: what the model says before each of them."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([PROMPT + output_ids])).logits[0, len(PROMPT) - 1 : -1]


def reference_scores(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> torch.Tensor:
    """Logit bias and penalties by transformers' processors and OpenAI's formula; [V] in float64."""
    text: Any = torch.tensor([[*prompt, *output]])
    scores: Any = logits.double()[None].clone()
    if params.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in params.logit_bias])(text, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(text, scores)
    for token_id, count in Counter(output).items():
        scores[0, token_id] -= params.presence_penalty + count * params.frequency_penalty
    return scores[0]


def reference_token(scores: torch.Tensor, params: SamplingParams, position: int) -> int:
    if params.temperature == 0:
        return int(scores.argmax())
    assert params.seed is not None
    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(params.temperature),
            MinPLogitsWarper(params.min_p),
            TopKLogitsWarper(params.top_k),
            TopPLogitsWarper(params.top_p),
        ]
    )
    logprobs = warpers(NO_TEXT, scores[None])[0].log_softmax(dim=-1)
    return int(np.argmax(logprobs.numpy() + gumbel_noise(params.seed, position, len(logprobs))))


# --- against a reference, one position at a time ---


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    params = SamplingParams(temperature=0.7, min_p=min_p, seed=0)
    kept = filtered_logprobs(logits, params)
    wanted = MinPLogitsWarper(min_p)(NO_TEXT, logits[None] / 0.7)[0].log_softmax(dim=-1)
    torch.testing.assert_close(kept, wanted)
    assert 0 < kept.isfinite().sum() < 200
    ids = kept_ids(logits.numpy(), params)
    assert ids is not None and ids.tolist() == kept.isfinite().nonzero()[:, 0].tolist()


def test_min_p_comes_before_top_p() -> None:
    logits = torch.log(torch.tensor([0.5, 0.2, 0.16, 0.14]))
    params = SamplingParams(temperature=1.0, min_p=0.3, top_p=0.75, seed=0)
    kept = filtered_logprobs(logits, params).exp()
    # Of 0.5, 0.2, 0.16 the first two hold 0.81; of all four tokens the first three would have been needed.
    torch.testing.assert_close(kept, torch.tensor([5 / 7, 2 / 7, 0, 0], dtype=torch.float64))
    ids = kept_ids(logits.numpy(), params)
    assert ids is not None and ids.tolist() == [0, 1]


@given(
    prompt=st.lists(st.integers(0, 19), min_size=1, max_size=30),
    output=st.lists(st.integers(0, 29), max_size=20),
    num_told=st.integers(0, 20),
    temperature=st.sampled_from([0.0, 0.9]),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.3, 3),
    bias=st.dictionaries(st.integers(0, 29), st.floats(-5, 5), max_size=5),
    seed=st.integers(0, 2**31),
)
def test_penalties_and_bias_are_those_of_transformers_and_openai(
    prompt: list[int],
    output: list[int],
    num_told: int,
    temperature: float,
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    seed: int,
) -> None:
    """However much of the output is told as such, and however much is on the path alone."""
    plain = SamplingParams(temperature=temperature, seed=seed, top_k=8, min_p=0.01, top_p=0.95)
    params = replace(
        plain,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed)) * 2
    before = logits.clone()
    sampler = Sampler(params, prompt)
    sampler.extend(output[:num_told])
    for position, row in enumerate(logits):
        scores = reference_scores(row, params, prompt, output)
        assert sampler.token(row, position, output[num_told:]) == reference_token(scores, plain, position)
    assert torch.equal(logits, before)


def test_what_is_on_a_path_is_forgotten_with_it() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=2.0), [0])
    logits = torch.tensor([0.0, 3.0, 2.0, 1.5])
    assert [sampler.token(logits, 1, path) for path in ([], [1], [1, 2], [])] == [1, 2, 3, 1]
    sampler.extend([1])
    assert [sampler.token(logits, 2, path) for path in ([], [2], [])] == [2, 3, 2]


def test_presence_and_frequency_spare_the_prompt_and_repetition_does_not() -> None:
    logits = torch.tensor([3.0, 2.9, -1.0])
    assert Sampler(SamplingParams(presence_penalty=2.0, frequency_penalty=2.0), [0, 0]).token(logits, 2) == 0
    assert Sampler(SamplingParams(repetition_penalty=1.5), [0, 0]).token(logits, 2) == 1


def test_logprobs_are_the_models_own_best_first() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4)).bfloat16()
    wanted = logits.double().log_softmax(dim=-1)
    entry = token_logprobs(logits, 11, 3)
    assert (entry.token_id, entry.logprob) == (11, pytest.approx(float(wanted[11]), abs=1e-5))
    assert [logprob for _, logprob in entry.top] == pytest.approx(wanted.topk(3).values.tolist(), abs=1e-5)
    assert [float(wanted[token_id]) for token_id, _ in entry.top] == wanted.topk(3).values.tolist()
    assert token_logprobs(logits, 11, 0).top == ()
    assert len(token_logprobs(logits[:12], 11, 20).top) == 12


# --- drafts ---


@given(temperature=st.floats(0.05, 3), min_p=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_a_draft_that_knows_the_target_guesses_every_draw_with_bias_and_min_p(
    temperature: float, min_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, min_p=min_p, seed=seed, logit_bias=((3, 5.0), (20, -7.5)))
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) * 3
    positions = np.array([7, 8, 9, 7])
    for each in (params, replace(params, temperature=0.0)):
        guesses = Sampler(each).draft_children(logits, positions, 1)[0][:, 0].tolist()
        assert guesses == [Sampler(each).token(row, at) for row, at in zip(logits, positions.tolist(), strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_hint_is_biased_as_a_draft_is(temperature: float) -> None:
    logits, positions = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)), np.array([4, 9, 30])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=5, logit_bias=((3, 3.0), (7, -2.0))))
    best = logits.double().log_softmax(dim=-1).topk(12)
    named = sampler.hint_logprobs(best.indices.numpy(), best.values.numpy(), positions)
    ids, wanted = sampler.draft_children(logits, positions, 12)
    named = np.take_along_axis(named, best.indices.argsort(dim=1).numpy(), axis=1)
    assert np.exp(np.take_along_axis(named, ids, axis=1)) == pytest.approx(np.exp(wanted), abs=1e-4)


@pytest.mark.parametrize("values", [{"top_k": 2, "seed": 7}, {"min_p": 0.5, "seed": 9}], ids=str)
def test_narrow_filters_leave_the_tree_numbers(checkpoint_dir: Callable[[str], Path], values: dict[str, Any]) -> None:
    """A dropped token's share times a hint's was 0, and the tree's scores were infinite: a warning, here an error."""
    params = SamplingParams(NUM_TOKENS, 0.8, **values)
    generation = run(checkpoint_dir("llama"), params, "flow", 3, "eagle")
    assert generation.output_ids == run(checkpoint_dir("llama"), params).output_ids


# --- whole texts ---


@pytest.mark.parametrize(  # of two and three stages, each has every other setting
    ("params", "temperature", "draft", "num_stages"),
    [
        pytest.param(params, temperature, draft, 2 + (i + j + k) % 2, id=f"{name}-{temperature}-{draft}")
        for i, (name, params) in enumerate({"repel": REPEL, "attract": ATTRACT}.items())
        for j, temperature in enumerate((0.0, 0.8))
        for k, draft in enumerate(("eagle", "ngram", "known"))
    ],
)
def test_texts_with_everything_on_are_those_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    params: SamplingParams,
    temperature: float,
    draft: str,
    num_stages: int,
) -> None:
    directory, params = checkpoint_dir("llama"), replace(params, temperature=temperature)
    plain = plain_text_of(directory, params)
    original, lengths = Generation.verify, list[int]()

    def verify_twice(generation: Generation) -> Verdict | None:
        """A verdict that is thrown away must leave no trace."""
        first, second = original(generation), original(generation)
        assert first == second
        lengths.append(len(first.token_ids) if first else 0)
        return second

    monkeypatch.setattr(Generation, "verify", verify_twice)
    source = KnownSource(PROMPT + plain.output_ids) if draft == "known" else draft
    fast = run(directory, params, "flow", num_stages, source)
    assert fast.output_ids == plain.output_ids
    assert len(fast.output_ids) == len(fast.output_logprobs) == len(plain.output_logprobs) == NUM_TOKENS
    assert fast.stats.accepted > 0
    if draft == "known":
        assert max(lengths) >= 4, "several tokens came at once"
    for ours, theirs in zip(fast.output_logprobs, plain.output_logprobs, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("params", [REPEL, ATTRACT], ids=["repel", "attract"])
def test_plain_decoding_is_that_of_the_whole_model_with_the_reference_processors(
    checkpoint_dir: Callable[[str], Path], params: SamplingParams, temperature: float
) -> None:
    directory, params = checkpoint_dir("qwen2"), replace(params, temperature=temperature)
    output_ids = run(directory, params).output_ids
    logits = whole_model_logits(directory, output_ids)
    for i, token_id in enumerate(output_ids):
        scores = reference_scores(logits[i], params, PROMPT, output_ids[:i])
        assert token_id == reference_token(scores, params, len(PROMPT) + i)
    plain = SamplingParams(NUM_TOKENS, temperature, params.top_p, params.top_k, params.seed)
    assert output_ids != run(directory, plain).output_ids, "the parameters did something"


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_text_with_a_repetition_penalty_is_that_of_transformers(
    checkpoint_dir: Callable[[str], Path], penalty: float
) -> None:
    directory, params = checkpoint_dir("qwen3"), SamplingParams(NUM_TOKENS, repetition_penalty=penalty)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    whole = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        repetition_penalty=penalty,
    )[0].tolist()
    assert run(directory, params).output_ids == whole[len(PROMPT) :]
    assert run(directory, params, "flow", 3, KnownSource(whole)).output_ids == whole[len(PROMPT) :]
    assert run(directory, SamplingParams(NUM_TOKENS)).output_ids != whole[len(PROMPT) :]


@pytest.mark.parametrize("schedule", ["ar", "serial", "lockstep", "pipedec", "flow"])
def test_logprobs_are_those_of_the_whole_model(checkpoint_dir: Callable[[str], Path], schedule: str) -> None:
    """The model's own, whatever the parameters make of them; for accepted guesses and for bonus tokens."""
    directory = checkpoint_dir("mistral")
    generation = run(directory, REPEL, schedule, 2, KnownSource(PROMPT + run(directory, REPEL).output_ids))
    wanted = whole_model_logits(directory, generation.output_ids).double().log_softmax(dim=-1)
    assert (generation.stats.accepted > 0) == (schedule != "ar")
    assert [entry.token_id for entry in generation.output_logprobs] == generation.output_ids
    for entry, logprobs in zip(generation.output_logprobs, wanted, strict=True):
        assert entry.logprob == pytest.approx(float(logprobs[entry.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == logprobs.topk(5).indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(logprobs.topk(5).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("num_logprobs", [None, 0])
def test_logprobs_are_given_as_asked_for(checkpoint_dir: Callable[[str], Path], num_logprobs: int | None) -> None:
    generation = run(checkpoint_dir("llama"), SamplingParams(4, num_logprobs=num_logprobs))
    assert [entry.top for entry in generation.output_logprobs] == ([] if num_logprobs is None else [()] * 4)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("schedule", ["ar", "serial", "lockstep", "pipedec", "flow"])
def test_stop_tokens_end_a_text_in_the_middle_of_what_was_accepted(
    checkpoint_dir: Callable[[str], Path], schedule: str, ignore_eos: bool
) -> None:
    directory = checkpoint_dir("llama")
    whole = run(directory, REPEL).output_ids
    eos_id, stop_id = (token_id for i, token_id in enumerate(whole) if i in (10, 18))
    eos_at, stop_at = whole.index(eos_id), whole.index(stop_id)
    assert 2 < eos_at < stop_at < NUM_TOKENS - 1
    params = replace(REPEL, stop_token_ids=frozenset({stop_id}), ignore_eos=ignore_eos)
    generation = run(directory, params, schedule, 2, KnownSource(PROMPT + whole), frozenset({eos_id}))
    assert generation.output_ids == whole[: (stop_at if ignore_eos else eos_at) + 1]
    assert generation.finish_reason == "stop"
    assert len(generation.output_logprobs) == len(generation.output_ids)
