from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flowspec.core import MAX_SEED, SamplingParams
from flowspec.sampling import Sampler, filtered_logprobs, gumbel_noise


def test_greedy_takes_the_largest_logit() -> None:
    assert Sampler(SamplingParams()).token(torch.tensor([0.1, 3.0, 2.9]), 5) == 1


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(50)
    params = SamplingParams(temperature=0.9, seed=11)
    draws = [Sampler(params).token(logits, position) for position in range(200)]
    sampler = Sampler(params)
    assert [sampler.token(logits, position) for position in reversed(range(200))] == draws[::-1]
    assert draws != [Sampler(SamplingParams(temperature=0.9, seed=12)).token(logits, p) for p in range(200)]


def test_noise_of_different_positions_shares_nothing() -> None:
    noise = np.concatenate([gumbel_noise(3, position, 1000) for position in range(20)])
    assert len(np.unique(noise)) == len(noise)
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_k=5, seed=2),
        SamplingParams(temperature=1.3, top_p=0.8, seed=3),
        SamplingParams(temperature=0.8, top_k=6, top_p=0.9, seed=4),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(params: SamplingParams) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    expected = filtered_logprobs(logits, params).exp().numpy()
    sampler, num_draws = Sampler(params), 20_000
    counts = np.bincount([sampler.token(logits, position) for position in range(num_draws)], minlength=12)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] * num_draws).pvalue > 1e-3


def test_filters_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    by_k = filtered_logprobs(logits, SamplingParams(temperature=1.0, top_k=2, seed=0)).exp()
    torch.testing.assert_close(by_k, torch.tensor([2 / 3, 1 / 3, 0, 0], dtype=torch.float64))
    by_p = filtered_logprobs(logits, SamplingParams(temperature=1.0, top_p=0.7, seed=0)).exp()
    torch.testing.assert_close(by_p, torch.tensor([2 / 3, 1 / 3, 0, 0], dtype=torch.float64))
    only_best = filtered_logprobs(logits, SamplingParams(temperature=1.0, top_p=1e-9, seed=0)).exp()
    torch.testing.assert_close(only_best, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))


@given(
    seed=st.integers(0, MAX_SEED),
    temperature=st.floats(0.05, 3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
)
def test_a_draft_that_knows_the_target_guesses_every_draw(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed % 2**31)) * 3
    positions = np.array([7, 8, 9, 7])
    guesses = Sampler(params).draft_logprobs(logits, positions).argmax(dim=-1).tolist()
    drawn = [Sampler(params).token(row, position) for row, position in zip(logits, positions.tolist(), strict=True)]
    assert guesses == drawn


def test_a_greedy_draft_sees_its_own_distribution() -> None:
    logits = torch.randn(3, 20)
    logprobs = Sampler(SamplingParams()).draft_logprobs(logits, np.array([1, 2, 3]))
    assert torch.allclose(logprobs, logits.log_softmax(-1))


def test_draft_logprobs_are_finite_and_sum_to_one() -> None:
    params = SamplingParams(temperature=0.7, top_k=3, top_p=0.5, seed=1)
    logprobs = Sampler(params).draft_logprobs(torch.randn(2, 30), np.array([4, 5]))
    assert logprobs.isfinite().all()
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(2))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_hint_that_names_the_whole_distribution_says_what_a_draft_would(temperature: float) -> None:
    logits, positions = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)), np.array([4, 9, 30])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=5))
    best = logits.double().log_softmax(dim=-1).topk(12)
    named = sampler.hint_logprobs(best.indices.numpy(), best.values.numpy(), positions)
    wanted = sampler.draft_logprobs(logits, positions).gather(1, best.indices).double().numpy()
    assert np.exp(named) == pytest.approx(np.exp(wanted), abs=1e-4)


def test_a_hint_knows_the_noise_of_the_tokens_it_names() -> None:
    """A draw that is among them is the hint's first guess most of the time."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2))
    best = logits.double().log_softmax(dim=-1).topk(16)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7))
    hits = num_named = 0
    for position in range(200):
        named = sampler.hint_logprobs(best.indices.numpy(), best.values.numpy(), np.array([position]))
        assert np.exp(named).sum() < 1
        token = sampler.token(logits[0], position)
        if token in best.indices[0].tolist():
            num_named += 1
            hits += int(best.indices[0, named[0].argmax()]) == token
    assert hits == num_named > 100


def test_looking_ahead_at_the_noise_changes_no_draw() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    logits = torch.randn(10, 40)
    plain = [Sampler(params).token(logits[i], i) for i in range(10)]
    sampler = Sampler(params)
    tokens: list[int] = []
    for i in range(10):
        sampler.draft_logprobs(logits[:4], np.arange(i, i + 4))
        tokens.append(sampler.token(logits[i], i))
    assert tokens == plain
