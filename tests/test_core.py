from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.core import LayerRange, Partition, SamplingParams
from flowspec.errors import UsageError


@given(st.integers(1, 200), st.data())
def test_an_even_partition_tiles_all_layers_once(num_layers: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, num_layers))
    partition = Partition.even(num_layers, num_stages)
    assert len(partition) == num_stages
    assert [i for stage in partition.stages for i in range(stage.start, stage.end)] == list(range(num_layers))
    sizes = [len(stage) for stage in partition.stages]
    assert max(sizes) - min(sizes) <= 1
    assert Partition.parse(str(partition)) == partition


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0:4,5:8", "gap"),
        ("0:4,3:8", "overlap"),
        ("1:8", "must start at layer 0"),
        ("0:4,4:4", "empty"),
        ("0-4,4-8", "no range"),
        ("", "no range"),
        ("0:4,", "no range"),
        ("0:-4", "no range"),
    ],
)
def test_a_partition_that_does_not_tile_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Partition.parse(text)


def test_a_partition_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="covers 6 layers, but the model has 8"):
        Partition.parse("0:3,3:6").check_fits(8)
    with pytest.raises(UsageError, match="only 8 layers"):
        Partition.even(8, 9)
    with pytest.raises(UsageError, match="at least one"):
        Partition.even(8, 0)


def test_layer_ranges_are_half_open() -> None:
    assert len(LayerRange(2, 5)) == 3
    with pytest.raises(UsageError):
        LayerRange(3, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"presence_penalty": -2.1},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": 2.1},
        {"frequency_penalty": float("inf")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, 100.5),)},
        {"logit_bias": ((1, float("nan")),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"stop_token_ids": frozenset({3, -1})},
        {"num_logprobs": -1},
        {"num_logprobs": 21},
        {"stop": ("a", "")},
        {"stop": ("a",) * 17},
    ],
)
def test_impossible_sampling_parameters_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(values))} "):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_the_bounds_of_sampling_parameters_are_allowed() -> None:
    SamplingParams(min_p=1.0, presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=0.01, num_logprobs=20)
    SamplingParams(logit_bias=((0, -100.0), (1, 100.0)), stop_token_ids=frozenset({0}), stop=("a",) * 16)


def test_penalties_are_off_until_one_is_set() -> None:
    assert not SamplingParams(min_p=0.5, logit_bias=((1, 1.0),)).has_penalties
    for values in ({"presence_penalty": -0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 0.9}):
        assert SamplingParams(**values).has_penalties  # type: ignore[arg-type]
