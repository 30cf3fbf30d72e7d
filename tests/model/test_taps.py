"""What stages add up for a draft: the same sum for every partition, and for every way to cut the rows into segments."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flowspec.core import LayerRange, Partition, TapShape, Weights
from flowspec.model.backends import load_stage, make_taps
from flowspec.model.loader import Checkpoint
from flowspec.model.packed import pack
from flowspec.model.stage import Part
from flowspec.model.taps import Taps, TapSum

SIZE, WIDTH = 32, 24
TEXT = [3, 17, 5, 80, 2, 2, 41, 9, 60, 11, 7]
SHAPES = {
    "plain": TapShape((1, 3, 5), WIDTH),
    "both ends": TapShape((0, 2, 6), WIDTH),
    "normed": TapShape((0, 1, 2, 4, 6), WIDTH, norm_eps=1e-5),
    "with squares": TapShape((1, 3, 6), WIDTH + 1, has_squares=True),
}
PARTITIONS = ("0:6", "0:1,1:6", "0:3,3:6", "0:2,2:4,4:6", "0:1,1:2,2:3,3:4,4:5,5:6")


def blocks_of(shape: TapShape) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {layer: torch.randn(WIDTH, SIZE, generator=generator) * 0.2 for layer in shape.layers}


class Chain:
    """All stages of a model, which run segments one after the other."""

    def __init__(self, directory: Path, partition: str, shape: TapShape, weights: Weights = "float") -> None:
        checkpoint = Checkpoint.open(directory)
        self.stages: list[Any] = []
        self.taps: list[Taps] = []
        for layers in Partition.parse(partition).stages:
            stage = load_stage(checkpoint, layers, "float32", weights, "cpu")
            own = {layer: blocks_of(shape)[layer] for layer in shape.of_stage(layers, stage.is_last)}
            self.stages.append(stage)
            self.taps.append(make_taps(shape, layers, own, "float32", weights, "cpu"))
        self.caches = [stage.open_cache() for stage in self.stages]
        self.num_rows = 0

    def run(self, token_ids: Sequence[int]) -> Tensor:
        """The features [n, width] of the next tokens of a text."""
        rows, total = torch.tensor(token_ids), None
        positions = range(self.num_rows, self.num_rows + len(rows))
        for stage, taps, cache in zip(self.stages, self.taps, self.caches, strict=True):
            assert taps.is_begun == (total is not None)
            tap_sum = TapSum(taps, total)
            *_, rows = stage.steps([Part(rows, cache.slots.append_prefix(positions), cache)], tap_sum)
            total = tap_sum.total
        self.num_rows += len(token_ids)
        assert total is not None
        return total


@pytest.mark.parametrize("name", SHAPES)
def test_no_partition_changes_a_bit_of_the_sum(checkpoint_dir: Callable[[str], Path], name: str) -> None:
    sums = [Chain(checkpoint_dir("qwen3"), partition, SHAPES[name]).run(TEXT) for partition in PARTITIONS]
    assert sums[0].shape == (len(TEXT), SHAPES[name].width)
    assert all(torch.equal(each, sums[0]) for each in sums[1:])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_sum_is_made_of_transformers_hidden_states(
    checkpoint_dir: Callable[[str], Path], family: str, name: str
) -> None:
    shape, directory = SHAPES[name], checkpoint_dir(family)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    before_norm: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0][0]))
    with torch.inference_mode():
        states = model(torch.tensor([TEXT]), output_hidden_states=True).hidden_states
    streams = [*(rows[0] for rows in states[:-1]), before_norm[0]]
    expected = torch.zeros(len(TEXT), WIDTH)
    for layer, block in blocks_of(shape).items():
        rows = streams[layer]
        if shape.norm_eps is not None:
            rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + shape.norm_eps)
        expected += rows @ block.T
    found = Chain(directory, "0:2,2:6", shape).run(TEXT)
    torch.testing.assert_close(found[:, :WIDTH], expected, atol=1e-3, rtol=1e-4)
    if shape.has_squares:
        together = torch.cat([streams[layer] for layer in shape.layers], dim=-1)
        torch.testing.assert_close(found[:, -1], together.pow(2).mean(-1), atol=1e-3, rtol=1e-4)


def test_segments_change_the_sum_by_rounding_alone(checkpoint_dir: Callable[[str], Path]) -> None:
    whole = Chain(checkpoint_dir("qwen3"), "0:3,3:6", SHAPES["plain"]).run(TEXT)
    chain = Chain(checkpoint_dir("qwen3"), "0:3,3:6", SHAPES["plain"])
    parts = torch.cat([chain.run(TEXT[:4]), chain.run(TEXT[4:5]), chain.run(TEXT[5:])])
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


needs_kernels = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


@needs_kernels
@pytest.mark.parametrize("name", SHAPES)
def test_on_matrix_kernels_neither_segments_nor_partitions_change_a_bit(
    checkpoint_dir: Callable[[str], Path], name: str
) -> None:
    directory, shape = checkpoint_dir("qwen3"), SHAPES[name]
    whole = Chain(directory, "0:6", shape, "int8").run(TEXT)
    chain = Chain(directory, "0:2,2:5,5:6", shape, "int8")
    parts = torch.cat([chain.run(TEXT[:4]), *(chain.run([token]) for token in TEXT[4:7]), chain.run(TEXT[7:])])
    assert torch.equal(parts, whole)


@needs_kernels
def test_matrix_kernels_multiply_by_the_rounded_block(checkpoint_dir: Callable[[str], Path]) -> None:
    shape = TapShape((2,), WIDTH)
    block = blocks_of(shape)[2]
    rows = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(3))
    taps = make_taps(shape, LayerRange(0, 6), {2: block}, "float32", "int8", "cpu")
    share = taps.share(2, rows)
    assert share is not None
    torch.testing.assert_close(share, rows @ pack(block, 8).unpacked().T, atol=0.1, rtol=0.05)


def test_each_tap_belongs_to_one_stage() -> None:
    shape = TapShape((0, 3, 4, 6), WIDTH)
    stages = Partition.parse("0:3,3:4,4:6").stages
    assert [shape.of_stage(stage, stage.end == 6) for stage in stages] == [(0,), (3,), (4, 6)]
