"""The synthetic language: what its drafts know of it, and that its text depends on every mask at every stage."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from flowspec.core import SamplingParams
from flowspec.model.synthetic import (
    NUM_CANDIDATES,
    QUALITIES,
    VOCAB_SIZE,
    Language,
    SyntheticCache,
    SyntheticHead,
    SyntheticStage,
    increments,
    mix,
    quality,
    uniform,
)
from flowspec.sampling import Sampler

NUM_CONTEXTS = 20_000


def contexts_of(num: int, seed: int = 3) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(-(2**63), 2**63, size=(num, 2), dtype=np.int64)


DRAFTS = [name for name, own in QUALITIES.items() if not own.is_clairvoyant]  # which has no scores of its own


def guesses(language: Language, staleness: int) -> tuple[float, float]:
    """Of the draft's best token: how often it is the target's greedy one, and what the draft thinks of that."""
    contexts = contexts_of(NUM_CONTEXTS)
    token_ids, logprobs = language.draft(contexts, np.full(NUM_CONTEXTS, staleness), top_k=1)
    targets = language.target_logits(contexts).argmax(axis=1)
    return float((token_ids[:, 0] == targets).mean()), float(np.exp(logprobs[:, 0]).mean())


@pytest.mark.parametrize("staleness", [1, 9])
def test_a_clairvoyant_draft_is_right_wherever_its_candidates_are(staleness: int) -> None:
    contexts = contexts_of(2000)
    own, foreseeing = (Language(quality(name)) for name in ("eagle1", "eagle1-clairvoyant"))
    truths = own.target_logits(contexts).argmax(axis=1)
    candidates = own.candidates(contexts)[0][:, :NUM_CANDIDATES]
    is_candidate = (candidates == truths[:, None]).any(axis=1)
    assert 0.9 < is_candidate.mean() < 1
    token_ids, logprobs = foreseeing.draft(contexts, np.full(2000, staleness), top_k=4)
    assert np.array_equal(token_ids[:, 0] == truths, is_candidate)
    assert np.array_equal(np.exp(logprobs[:, 0]) > 0.9, is_candidate) and (logprobs[:, 1:] < -10).all()
    assert all(len(set(row)) == 4 for row in token_ids.tolist())


@pytest.mark.parametrize(
    ("name", "staleness", "rate"),
    [
        *(("eagle1", step, rate) for step, rate in ((1, 0.744), (3, 0.703), (5, 0.647), (8, 0.562), (12, 0.468))),
        *(("eagle3", step, rate) for step, rate in ((1, 0.83), (7, 0.82), (9, 0.72), (12, 0.60))),
        *(("block", step, rate) for step, rate in ((1, 0.845), (5, 0.83), (15, 0.79))),
        *(("weak", step, rate) for step, rate in ((1, 0.49), (3, 0.485), (5, 0.39))),
        *(("demo", step, rate) for step, rate in ((1, 0.905), (8, 0.895), (16, 0.88))),
        *(("ideal", step, 0.83) for step in (1, 3, 12)),
    ],
)
def test_a_draft_hits_as_often_as_it_was_calibrated_to(name: str, staleness: int, rate: float) -> None:
    assert guesses(Language(quality(name)), staleness)[0] == pytest.approx(rate, abs=0.015)


def test_a_block_guesses_worse_behind_each_token_that_it_did_not_guess_first() -> None:
    language, contexts = Language(quality("block")), contexts_of(NUM_CONTEXTS)
    targets, levels = language.target_logits(contexts).argmax(axis=1), np.full(NUM_CONTEXTS, 4)
    hits = [
        (language.draft(contexts, levels, 1, np.full(NUM_CONTEXTS, detours))[0][:, 0] == targets).mean()
        for detours in (0, 1, 2, 4)
    ]
    assert all(before > after + 0.01 for before, after in pairwise(hits))


@pytest.mark.parametrize("name", DRAFTS)
def test_a_fresh_draft_knows_how_often_it_is_right(name: str) -> None:
    hits, predicted = guesses(Language(quality(name)), staleness=1)
    assert hits == pytest.approx(predicted, abs=0.01)


@pytest.mark.parametrize("name", DRAFTS)
def test_a_fresh_draft_is_right_about_sure_and_unsure_contexts_alike(name: str) -> None:
    language, contexts = Language(quality(name)), contexts_of(NUM_CONTEXTS)
    token_ids, logprobs = language.draft(contexts, np.ones(NUM_CONTEXTS, dtype=np.int64), top_k=1)
    hits, predicted = token_ids[:, 0] == language.target_logits(contexts).argmax(axis=1), np.exp(logprobs[:, 0])
    for low, high in ((0.0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.0)):
        bin_ = (predicted >= low) & (predicted < high)
        assert bin_.sum() > 500
        deviation = np.sqrt((predicted[bin_] * (1 - predicted[bin_])).sum()) / bin_.sum()
        assert abs(hits[bin_].mean() - predicted[bin_].mean()) < 4 * deviation + 1e-3


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("staleness", [1, 4])
def test_a_draft_offers_distinct_tokens_best_first_with_less_than_all_probability(name: str, staleness: int) -> None:
    contexts = contexts_of(500)
    token_ids, logprobs = Language(quality(name)).draft(contexts, np.full(500, staleness), NUM_CANDIDATES)
    assert all(len(set(row)) == NUM_CANDIDATES for row in token_ids.tolist())
    assert (np.diff(logprobs, axis=1) <= 0).all() and (logprobs <= 0).all()
    assert (np.exp(logprobs).sum(axis=1) <= 1 + 1e-9).all()


def test_the_candidates_of_a_context_are_all_tokens_each_once() -> None:
    token_ids, logprobs = Language(quality("eagle1")).candidates(contexts_of(1000))
    assert (np.sort(token_ids, axis=1) == np.arange(VOCAB_SIZE)).all()
    assert logprobs.shape == (1000, NUM_CANDIDATES)


@pytest.mark.parametrize("name", DRAFTS)
def test_target_logits_are_log_probabilities(name: str) -> None:
    logits = Language(quality(name)).target_logits(contexts_of(2000))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(np.exp(logits).sum(axis=1), 1.0, atol=1e-9)


def test_tokens_sampled_at_temperature_1_are_distributed_as_the_logits_say() -> None:
    """Chi-square in one unsure context, over the seeds of as many requests."""
    language = Language(quality("eagle1"))
    contexts = contexts_of(200)
    row = int(np.argmin(np.abs(language.target_logits(contexts).max(axis=1) - np.log(0.7))))
    logits = SyntheticHead(language).logits(torch.from_numpy(np.tile(contexts[row], (1, 2))))[0]
    num = 6000
    counts = np.zeros(VOCAB_SIZE)
    for seed in range(num):
        counts[Sampler(SamplingParams(temperature=1.0, seed=seed)).token(logits, position=9)] += 1
    expected = logits.exp().numpy() * num
    assert expected.min() > 4 and expected.max() < 0.8 * num
    assert stats.chisquare(counts, expected / expected.sum() * num).pvalue > 1e-4


def test_hashes_do_not_collide_and_are_uniform() -> None:
    values = np.arange(1, 100_001, dtype=np.uint64)
    assert len(np.unique(mix(values))) == len(values)
    assert mix(np.zeros(1, dtype=np.uint64))[0] == 0
    for salt in (1, 2):
        draws = uniform(values, salt)
        assert ((draws > 0) & (draws < 1)).all()
        assert draws.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * len(draws)))
        assert stats.kstest(draws, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(uniform(values, 1), uniform(values, 2))[0, 1]) < 0.02


def test_each_token_at_each_position_adds_something_of_its_own() -> None:
    token_ids, positions = (grid.ravel() for grid in np.meshgrid(np.arange(VOCAB_SIZE), np.arange(500)))
    assert len(np.unique(increments(token_ids, positions)[:, 0])) == len(token_ids)


# --- a stage sees what its mask shows ---


def three_rows(cache: SyntheticCache) -> NDArray[np.int64]:
    """A prefix of one token, the root, and a child of it."""
    return np.concatenate([cache.slots.append_prefix([0]), cache.slots.place([1, 2], [0, 1], [1, 2])[1]])


def with_a_slot_too_many(cache: SyntheticCache) -> NDArray[np.int64]:
    """As ``three_rows``, but a fourth row that no one should see is in the prefix."""
    slots = three_rows(cache)
    extra = cache.slots.append_prefix([0])
    cache.increments[extra] = increments(np.array([9]), np.array([0]))
    return slots


def with_a_slot_too_few(cache: SyntheticCache) -> NDArray[np.int64]:
    """As ``three_rows``, but the child does not see the root: both are children of nothing."""
    prefix = cache.slots.append_prefix([0])
    root = cache.slots.place([1], [0], [1])[1]
    cache.slots.commit([1], 2)
    child = cache.slots.place([2], [1], [2])[1]
    cache.slots._in_prefix[root] = False
    cache.slots._paths[int(root[0])] = (int(root[0]),)
    return np.concatenate([prefix, root, child])


TOKENS = torch.tensor([5, 6, 7])


def test_a_row_of_the_first_stage_sums_up_its_ancestors() -> None:
    stage, cache = SyntheticStage(True, False), SyntheticStage(True, False).open_cache(1)
    hidden = stage.forward(TOKENS, three_rows(cache), cache).numpy()
    own = increments(TOKENS.numpy(), np.arange(3))
    np.testing.assert_array_equal(hidden[:, :2], own)
    np.testing.assert_array_equal(hidden[:, 2:], np.cumsum(own, axis=0))


def test_later_stages_that_see_the_same_change_nothing() -> None:
    caches = [SyntheticStage(i == 0, i == 2).open_cache(1) for i in range(3)]
    hidden = SyntheticStage(True, False).forward(TOKENS, three_rows(caches[0]), caches[0])
    again = SyntheticStage(False, False).forward(hidden, three_rows(caches[1]), caches[1])
    last = SyntheticStage(False, True).forward(again, three_rows(caches[2]), caches[2])
    assert torch.equal(hidden, again) and torch.equal(again, last)


@pytest.mark.parametrize("wrong", [with_a_slot_too_many, with_a_slot_too_few])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_wrong_mask_leads_the_text_astray_at_any_stage(
    wrong: Callable[[SyntheticCache], NDArray[np.int64]], is_first: bool
) -> None:
    right_cache, wrong_cache, first_cache = (SyntheticStage(True, False).open_cache(1) for _ in range(3))
    stage = SyntheticStage(is_first, not is_first)
    inputs = TOKENS if is_first else SyntheticStage(True, False).forward(TOKENS, three_rows(first_cache), first_cache)
    expected = stage.forward(inputs, three_rows(right_cache), right_cache)
    got = stage.forward(inputs, wrong(wrong_cache), wrong_cache)
    assert torch.equal(got[:, :2], expected[:, :2])
    assert not torch.equal(got[2, 2:3], expected[2, 2:3])
    logits = SyntheticHead(Language(quality("eagle1"))).logits
    assert not torch.equal(logits(got)[2], logits(expected)[2])


def test_a_stage_without_rows_gives_none() -> None:
    stage = SyntheticStage(True, True)
    hidden = stage.forward(torch.empty(0, dtype=torch.int64), np.empty(0, dtype=np.int64), stage.open_cache(0))
    assert hidden.shape == (0, SyntheticStage.hidden_size)
