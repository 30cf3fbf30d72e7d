from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

from flowspec.core import MAX_SEED, SamplingParams
from flowspec.errors import NumericalError
from flowspec.filters import kept_ids, largest
from flowspec.noise import Noise, gumbel
from flowspec.sampling import Sampler
from plain_sampling import filtered_logprobs, gumbel_noise, plain_token
from pump import Pump

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {**HALVES, "float32": torch.float32}


def test_greedy_takes_the_largest_logit() -> None:
    assert Sampler(SamplingParams()).token(torch.tensor([0.1, 3.0, 2.9]), 5) == 1


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(50)
    params = SamplingParams(temperature=0.9, seed=11)
    draws = [Sampler(params).token(logits, position) for position in range(200)]
    sampler = Sampler(params)
    assert [sampler.token(logits, position) for position in reversed(range(200))] == draws[::-1]
    assert draws != [Sampler(SamplingParams(temperature=0.9, seed=12)).token(logits, p) for p in range(200)]


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
    sampler, num_draws = Sampler(params), 8_000
    counts = np.bincount([sampler.token(logits, position) for position in range(num_draws)], minlength=12)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] * num_draws).pvalue > 1e-3


@pytest.mark.parametrize(
    ("values", "kept"), [({}, None), ({"top_k": 2}, [0, 1]), ({"top_p": 0.7}, [0, 1]), ({"top_p": 1e-9}, [0])], ids=str
)
def test_filters_keep_what_they_say(values: dict[str, float], kept: list[int] | None) -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    params = SamplingParams(temperature=1.0, seed=0, **values)  # type: ignore[arg-type]
    ids = kept_ids(logits.numpy(), params)
    assert (None if ids is None else ids.tolist()) == kept
    assert filtered_logprobs(logits, params).isfinite().nonzero()[:, 0].tolist() == (kept or [0, 1, 2, 3])


def test_of_equally_probable_tokens_top_p_keeps_the_first() -> None:
    for size in (4, 1000, 50_000):
        ids = kept_ids(np.zeros(size), SamplingParams(temperature=1.0, top_p=0.5, seed=0))
        assert ids is not None and ids.tolist() == list(range(size // 2))


# --- noise ---


def test_noise_of_different_positions_shares_nothing() -> None:
    noise, ids = Noise(3), np.arange(1000)
    values = np.concatenate([noise.of(position, ids) for position in range(20)])
    assert len(np.unique(values)) == len(values)
    assert stats.kstest(values, "gumbel_r").pvalue > 1e-3


@given(
    seed=st.integers(0, MAX_SEED),
    position=st.integers(0, 2**20),
    asked=st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_noise_of_a_few_tokens_is_that_of_the_vocabulary(seed: int, position: int, asked: list[list[int]]) -> None:
    noise, whole = Noise(seed), gumbel_noise(seed, position, 3001)
    for ids in asked:
        assert np.array_equal(noise.of(position, np.array(ids)), whole[ids])


@given(seed=st.integers(0, MAX_SEED), level=st.floats(-50, 50))
def test_no_noise_above_a_level_is_missed(seed: int, level: float) -> None:
    is_above, whole = Noise(seed).is_above(7, level, 2000), gumbel_noise(seed, 7, 2000)
    assert is_above[whole >= level].all()
    assert not is_above[whole < level - 1e-6].any()


def test_noise_is_finite_for_any_bits() -> None:
    extremes = gumbel(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert -3.7 < extremes[0] < extremes[1] < 36.8


# --- the plain way ---


@st.composite
def rows_of_logits(draw: st.DrawFn) -> torch.Tensor:
    """Peaked, unsure and flat ones, with and without ties, by one type or another."""
    size = draw(st.sampled_from([1, 2, 31, 700, 9000, 20_000]))
    logits = torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    logits *= draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0]))
    if draw(st.booleans()):
        logits = logits.round()
    for at, value in draw(st.dictionaries(st.integers(0, size - 1), st.floats(-30, 30, width=16), max_size=4)).items():
        logits[at] = value
    return logits.to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])


@settings(max_examples=200)
@given(
    logits=rows_of_logits(),
    temperature=st.sampled_from([0.0, 1e-320, 0.1, 0.8, 1.0, 2.0, 1e300]) | st.floats(0.05, 3),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-9]) | st.floats(0.01, 1),
    top_k=st.sampled_from([0, 0, 1, 50, 800]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.05, 1.0]),
    seed=st.integers(0, MAX_SEED),
    position=st.integers(0, 2**20),
)
def test_tokens_are_those_of_the_plain_way(
    logits: torch.Tensor, temperature: float, top_p: float, top_k: int, min_p: float, seed: int, position: int
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    assert Sampler(params).token(logits, position) == plain_token(logits, params, position)


@pytest.mark.parametrize("top_p", [1.0, 0.95])
@pytest.mark.parametrize("scale", [0.3, 2.0, 4.0, 9.0])
def test_a_long_text_is_that_of_the_plain_way(scale: float, top_p: float) -> None:
    """Draws that only a rare noise decides are among so many."""
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=8)
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(2)) * scale
    sampler = Sampler(params)
    for position in range(400):
        row = logits[position % 4]
        assert sampler.token(row, position) == plain_token(row, params, position)


@given(logits=rows_of_logits(), seed=st.integers(0, MAX_SEED), top_p=st.sampled_from([1.0, 0.9]))
def test_bias_and_penalties_act_on_the_exact_logits(logits: torch.Tensor, seed: int, top_p: float) -> None:
    """In float64: what half a type's step adds to a logit may decide."""
    plain = SamplingParams(temperature=0.9, top_p=top_p, seed=seed)
    adjusted, last = logits.double(), len(logits) - 1
    adjusted[0] += 2.003
    adjusted[last] -= 0.7
    sampler = Sampler(replace(plain, logit_bias=((0, 2.003),), presence_penalty=0.7))
    sampler.extend([last])
    assert sampler.token(logits, 3) == plain_token(adjusted, plain, 3)


@given(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0]) | st.floats(-9, 9), min_size=1, max_size=300), st.data())
def test_the_largest_are_all_there_and_nothing_larger_is_left_out(values: list[float], data: st.DataObject) -> None:
    array, num = np.array(values), data.draw(st.integers(1, len(values)))
    ids = largest(array, num)
    assert len(ids) >= num and (np.diff(ids) > 0).all()
    assert array[np.setdiff1d(np.arange(len(array)), ids)].max(initial=-np.inf) < array[ids].min()


@given(exponent=st.integers(-323, -13), dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 2**31))
def test_the_smallest_temperatures_are_greedy(exponent: int, dtype: str, seed: int) -> None:
    """Logits divided by 1e-320 were infinite, and every token was 0."""
    params = SamplingParams(temperature=float(f"1e{exponent}"), top_p=0.95, seed=seed)
    logits = torch.randn(60, generator=torch.Generator().manual_seed(seed)) * 3
    best = int(logits.argmax())
    logits[best] += 0.5  # no tie when it is rounded
    for each in (params, replace(params, top_p=1.0), replace(params, top_k=7, min_p=0.1)):
        sampler = Sampler(each)
        assert sampler.token(logits.to(DTYPES[dtype]), 9) == best
        ids, logprobs = sampler.draft_children(logits[None], np.array([9]), 3)
        assert ids[0, 0] == best and logprobs[0, 0] == pytest.approx(0, abs=1e-6) and np.isfinite(logprobs).all()
        named = sampler.hint_logprobs(np.array([[4, best]]), np.log([[0.3, 0.6]]), np.array([9]))
        assert np.isfinite(named).all() and named[0].argmax() == 1


def test_the_smallest_repetition_penalty_does_not_overflow() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1, repetition_penalty=1e-320), [2, 3])
    assert sampler.token(torch.tensor([5.0, 4.0, 1.0, -1.0]), 2) == 2


# --- numbers that broke ---


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=1)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_logits_that_are_not_finite_are_an_error(params: SamplingParams, bad: float, dtype: str) -> None:
    """They gave token 0, without an end."""
    logits = torch.randn(40).to(DTYPES[dtype])
    logits[17] = bad
    advice = "run it in bfloat16 or float32" if dtype == "float16" else "weights or a worker's cache are damaged"
    with pytest.raises(NumericalError, match=f"logits for position 9 .*of 40, {dtype}.*{advice}"):
        Sampler(params).token(logits, 9)
    with pytest.raises(NumericalError):
        Sampler(params).token(torch.full((40,), bad), 9)


def with_a_broken_weight(directory: Path, copy: Path, name: str) -> Path:
    shutil.copytree(directory, copy)
    [path] = [path for path in copy.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(path)
    tensors[name].view(-1)[3] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(("schedule", "draft"), [("ar", "none"), ("flow", "eagle"), ("lockstep", "eagle")])
def test_a_model_whose_numbers_break_ends_the_request_with_an_error(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, schedule: str, draft: str
) -> None:
    """Also where the draft reads the broken numbers first."""
    broken = {"model.norm.weight": "hidden states after the last layer", "lm_head.weight": "logits"}
    for name, message in broken.items():
        pump = Pump(with_a_broken_weight(checkpoint_dir("llama"), tmp_path / name, name), 2, draft, schedule)
        pump.submit([3, 1, 4, 1, 5], SamplingParams(max_tokens=8))
        with pytest.raises(NumericalError, match=f"model's {message} for position 5 .*float32"):
            pump.run()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=1)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_draft_whose_numbers_break_guesses_nothing(params: SamplingParams, bad: float) -> None:
    logits = torch.randn(3, 40)
    good_ids, good_logprobs = Sampler(params).draft_children(logits, np.array([4, 4, 5]), 6)
    logits[1] = bad
    ids, logprobs = Sampler(params).draft_children(logits, np.array([4, 4, 5]), 6)
    assert len(set(ids[1].tolist())) == 6 and (logprobs[1] < -100).all()
    assert np.array_equal(ids[[0, 2]], good_ids[[0, 2]])
    assert np.array_equal(logprobs[[0, 2]], good_logprobs[[0, 2]])


# --- drafts ---


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
    guesses = Sampler(params).draft_children(logits, positions, 10)[0][:, 0].tolist()
    drawn = [Sampler(params).token(row, position) for row, position in zip(logits, positions.tolist(), strict=True)]
    assert guesses == drawn


def named(logits: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best tokens and their log-probabilities, as a draft model on a worker of its own names them."""
    logprobs, ids = logits.log_softmax(-1).topk(k)
    return ids.numpy(), logprobs.numpy()


@given(
    seed=st.integers(0, MAX_SEED),
    temperature=st.sampled_from([0.0, 0.3, 0.8, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
    min_p=st.sampled_from([0.0, 0.05]),
    bias=st.sampled_from([(), ((3, 4.0), (8, -100.0))]),
)
@example(seed=0, temperature=2.0, top_k=0, top_p=0.8489246493680191, min_p=0.0, bias=())
def test_tokens_that_a_draft_names_are_guessed_as_by_all_of_its_logits(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, bias: tuple[tuple[int, float], ...]
) -> None:
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "logit_bias": bias}
    sampler = Sampler(SamplingParams(temperature=temperature, seed=seed, **filters))  # type: ignore[arg-type]
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed % 2**31)) * 3
    positions = np.array([7, 8, 9, 7])
    ids, logprobs = sampler.draft_children(logits, positions, 10)
    named_ids, named_logprobs = sampler.named_children(*named(logits, 50), 50, positions, 10)
    is_sure = logprobs > -200  # the others fill the row up
    assert np.array_equal(ids[is_sure], named_ids[is_sure])
    assert np.allclose(logprobs, named_logprobs, atol=1e-4)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.95, seed=5)], ids=str)
def test_a_few_named_tokens_of_a_large_vocabulary_say_nearly_all(params: SamplingParams) -> None:
    logits = torch.randn(60, 50_000, generator=torch.Generator().manual_seed(0)) * 4
    positions, sampler = np.arange(60), Sampler(params)
    ids, logprobs = sampler.draft_children(logits, positions, 4)
    few_ids, few_logprobs = sampler.named_children(*named(logits, 256), 50_000, positions, 4)
    same = few_ids[:, 0] == ids[:, 0]
    assert same.mean() > 0.8 if params.temperature else (same.all() and np.allclose(few_logprobs, logprobs, atol=1e-3))


def test_what_a_draft_names_and_is_no_token_is_not_guessed() -> None:
    ids, logprobs = np.array([[4, -1, 2], [-1, -1, -1], [7, 8, 9]]), np.log([[0.5, 0.3, 0.1]] * 2 + [[np.nan] * 3])
    for params in (SamplingParams(), SamplingParams(temperature=0.8, seed=1)):
        children, values = Sampler(params).named_children(ids, logprobs, 20, np.array([4, 5, 6]), 4)
        assert set(children[0, :2].tolist()) == {4, 2} and (values[0, 2:] < -100).all()
        assert all(len(set(row)) == 4 and min(row) >= 0 for row in children.tolist())
        assert (values[1:] < -100).all()


@pytest.mark.parametrize("top_p", [1.0, 0.95])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 6.0])
def test_a_draft_guesses_in_a_large_vocabulary_what_it_guesses_in_a_small_one(scale: float, top_p: float) -> None:
    """Whether the nucleus is a few tokens or most of them: nearly all draws are the first guess."""
    params = SamplingParams(temperature=0.8, top_p=top_p, seed=5)
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * scale
    sampler, hits = Sampler(params), 0
    for position in range(40):
        ids, logprobs = sampler.draft_children(logits[None], np.array([position]), 10)
        assert (np.diff(logprobs[0]) <= 0).all() and len(set(ids[0].tolist())) == 10
        hits += sampler.token(logits, position) == ids[0, 0]
    assert hits >= 36


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [(1.0, 1.0, 0, 0.0), (0.8, 0.95, 0, 0.0), (0.9, 1.0, 40, 0.0), (1.2, 0.9, 0, 0.02), (0.8, 1.0, 900, 1e-3)],
)
def test_children_are_the_best_of_the_whole_vocabulary_with_its_noise(
    temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    """And their log-probabilities are nearly those that a sum over all of it would give."""
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=3)
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 4
    for position in range(20):
        ids, logprobs = Sampler(params).draft_children(logits[None], np.array([position]), 5)
        perturbed = filtered_logprobs(logits, params).numpy() + gumbel_noise(3, position, 20_000)
        wanted = torch.from_numpy(perturbed / 0.5).log_softmax(dim=-1).topk(5)
        assert ids[0].tolist() == wanted.indices.tolist()
        assert np.exp(logprobs[0]) == pytest.approx(wanted.values.exp().tolist(), abs=0.02)


@pytest.mark.parametrize("vocab_size", [20, 5000])
def test_a_greedy_draft_sees_its_own_distribution(vocab_size: int) -> None:
    logits = torch.randn(3, vocab_size)
    ids, logprobs = Sampler(SamplingParams()).draft_children(logits, np.array([1, 2, 3]), 10)
    wanted = logits.double().log_softmax(-1).topk(10)
    assert ids.tolist() == wanted.indices.tolist()
    assert logprobs == pytest.approx(wanted.values.numpy(), abs=1e-5)


def test_children_have_finite_logprobs_that_sum_to_one() -> None:
    """Also where the filters leave fewer tokens than there are to be children."""
    params = SamplingParams(temperature=0.7, top_k=3, top_p=0.5, seed=1)
    ids, logprobs = Sampler(params).draft_children(torch.randn(2, 30), np.array([4, 5]), 40)
    assert np.isfinite(logprobs).all()
    assert np.exp(logprobs).sum(axis=1) == pytest.approx(1)
    assert np.sort(ids, axis=1).tolist() == [list(range(30))] * 2


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_hint_that_names_the_whole_distribution_says_what_a_draft_would(temperature: float) -> None:
    logits, positions = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)), np.array([4, 9, 30])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=5))
    ids, wanted = sampler.draft_children(logits, positions, 12)
    logprobs = logits.double().log_softmax(dim=-1).numpy()
    named = sampler.hint_logprobs(ids, np.take_along_axis(logprobs, ids, axis=1), positions)
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
        sampler.draft_children(logits[:4], np.arange(i, i + 4), 5)
        tokens.append(sampler.token(logits[i], i))
    assert tokens == plain
