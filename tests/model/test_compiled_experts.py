"""Mixtures of experts on packed weights, against transformers' own with what these weights mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowspec.core import DType, LayerRange
from flowspec.errors import ModelError
from flowspec.model import layer_kernel
from flowspec.model.backends import load_stage
from flowspec.model.compiled_experts import put_experts
from flowspec.model.compiled_record import LayerRecord
from flowspec.model.layer_tensors import LayerTensors
from flowspec.model.loader import Checkpoint
from flowspec.model.packed import Bits, pack
from flowspec.model.stage_weights import EXPERTS, bare_model
from flowspec.model.team import Team
from tiny_models import make_checkpoint

LAYER = 1


class Rounded(Checkpoint):
    """Experts are what they are once they were packed."""

    bits: Bits = 8

    @classmethod
    def of(cls, directory: Path, bits: Bits) -> Rounded:
        rounded = cls(str(directory), directory, Checkpoint.open(directory).config)
        rounded.bits = bits
        return rounded

    def tensors(self, names: Iterable[str], dtype: DType, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().tensors(names, dtype, device):
            yield name, pack(tensor, self.bits).unpacked() if ".experts." in name else tensor


def torch_mixture(checkpoint: Checkpoint) -> Any:
    mixture = bare_model(checkpoint.config, "eager").layers[LAYER].mlp
    prefix = f"model.layers.{LAYER}.mlp."
    shapes = {prefix + name: tuple(weight.shape) for name, weight in mixture.named_parameters()}
    found = checkpoint.module_tensors(shapes, "float32", "cpu")
    mixture.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in found}, assign=True)
    assert mixture.experts.config._experts_implementation == EXPERTS
    return mixture


def packed_mixture(directory: Path, bits: Bits) -> LayerRecord:
    checkpoint, record = Checkpoint.open(directory), LayerRecord()
    layer = bare_model(checkpoint.config, "eager").layers[LAYER]
    put_experts(record, LayerTensors(checkpoint, f"model.layers.{LAYER}.", layer, bits), "mlp", layer.mlp)
    return record


def products(experts: LayerRecord, rows: Any) -> Any:
    return layer_kernel.given_by_experts(Team(1).mailbox, experts.words, rows)[:, : rows.shape[1]]


def random_rows(count: int, width: int) -> Any:
    return np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("family", "bits", "sizes"),
    [
        ("qwen3_moe", 8, {}),  # 24 inputs of the last matrices: one group, of no whole parts
        ("qwen3_moe", 8, {"moe_intermediate_size": 20, "norm_topk_prob": False}),
        ("qwen3_moe", 4, {"moe_intermediate_size": 96, "hidden_size": 160}),  # no whole blocks of outputs
        ("mixtral", 8, {"num_local_experts": 70}),  # nor of the router's
        ("mixtral", 4, {"intermediate_size": 128}),
    ],
)
def test_rows_get_what_their_experts_give(family: str, bits: Bits, sizes: dict[str, Any], tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, family, **sizes)
    rounded = Rounded.of(directory, bits)
    experts = packed_mixture(directory, bits)
    rows = random_rows(17, rounded.hidden_size)
    with torch.no_grad():
        wanted = torch_mixture(rounded)(torch.from_numpy(rows)[None])[0]
    error = np.linalg.norm(products(experts, rows) - wanted.numpy()) / float(wanted.norm())
    assert 0 < error < 0.02  # what rows lose that are rounded to 8 bits


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_have_their_bits_whatever_is_beside_them(checkpoint_dir: Callable[[str], Path], bits: Bits) -> None:
    experts = packed_mixture(checkpoint_dir("mixtral"), bits)
    rows = random_rows(40, 32)
    whole = products(experts, rows)
    for part in (slice(0, 1), slice(7, 9), slice(20, 37)):
        assert np.array_equal(products(experts, rows[part]), whole[part])


def test_a_gate_that_is_not_known_is_one_line(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "mixtral", hidden_act="gelu"))
    with pytest.raises(ModelError, match="layers are gated by 'gelu', which no kernel knows; use --weights float"):
        load_stage(checkpoint, LayerRange(0, 1), "float32", "int8", "cpu")
