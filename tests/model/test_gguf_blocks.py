"""Codes of quantised GGUF files against the package's own reading, and files that mix kinds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from flowspec import LLM, SamplingParams
from flowspec.core import LayerRange
from flowspec.model.backends import choose_weights, load_stage, open_checkpoint
from flowspec.model.gguf_blocks import own_bits, packed_blocks
from flowspec.model.packed import Bits
from flowspec.model.received import make_manifest, stage_shapes
from flowspec.model.stage import forward
from flowspec.model.stage_size import stage_bytes
from tiny_gguf import write_text_gguf

# As Q4_K_M is, and attn_output has no 256 inputs here.
MIXED: dict[str, Kind] = {"ffn_down": Kind.Q5_1, "attn_v": Kind.Q8_0, "token_embd": Kind.Q8_0, "attn_output": Kind.Q4_1}
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(Kind.Q8_0, 8), (Kind.Q5_0, 8), (Kind.Q4_0, 8), (Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q4_K, 4)],
    ids=lambda value: getattr(value, "name", value),
)
def test_any_codes_are_read_as_they_are(kind: Kind, bits: Bits) -> None:
    rng = np.random.default_rng(1)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (7, 512 // size, num_bytes), dtype=np.uint8)
    blocks[..., :4] = rng.uniform(1e-3, 2e-3, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if kind == Kind.Q5_0:  # whose third byte is of codes
        blocks[..., 2:4] = rng.integers(0, 256, (*blocks.shape[:2], 2), dtype=np.uint8)
    raw = blocks.reshape(7, -1)
    weight = packed_blocks(kind, raw, bits)
    assert (weight.shape, weight.bits) == ((7, 512), bits)
    wanted = gguf.dequantize(raw, kind)
    if kind != Kind.Q4_K:
        assert np.array_equal(weight.unpacked().numpy(), wanted)
        return
    steps = weight.scales.repeat(32, axis=2).reshape(7, 512)
    assert 0 < (np.abs(weight.unpacked().numpy() - wanted) / (steps + 2e-3)).max() < 0.03


def test_most_of_the_values_say_how_many_bits_a_file_has() -> None:
    def of_layers(*matrices: tuple[Kind, int]) -> Bits | None:
        return own_bits({f"model.layers.0.{number}": matrix for number, matrix in enumerate(matrices)})

    assert of_layers((Kind.Q4_K, 200), (Kind.Q6_K, 100), (Kind.F32, 900)) == 4
    assert of_layers((Kind.Q4_K, 100), (Kind.Q3_K, 200)) == 8
    assert of_layers((Kind.F16, 100), (Kind.F32, 1)) is None
    assert own_bits({"lm_head": (Kind.Q8_0, 900), "model.layers.0.mlp": (Kind.Q4_0, 1)}) == 4


@pytest.fixture(scope="module", params=["qwen3", "qwen3moe"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "model.gguf"
    sizes: dict[str, Any] = SIZES | ({"moe_intermediate_size": 256} if request.param == "qwen3moe" else {})
    write_text_gguf(path, family=request.param, kind=Kind.Q4_K, other_kinds=MIXED, **sizes)
    return path


def test_what_a_file_of_4_bits_has_in_more_stays_in_8(mixed: Path) -> None:
    pytest.importorskip("numba")
    checkpoint = open_checkpoint(str(mixed))
    assert checkpoint.own_bits == 4 and choose_weights(checkpoint, "auto", "cpu") == "int4"
    layers, rows = LayerRange(1, 3), torch.randn(9, 256, generator=torch.Generator().manual_seed(0))
    stages = {
        weights: load_stage(checkpoint, layers, "float32", weights, "cpu") for weights in ("float", "int8", "int4")
    }
    hidden: dict[str, torch.Tensor] = {}
    for weights, stage in stages.items():
        cache = stage.open_cache()
        hidden[weights] = forward(stage, rows, cache.slots.append_prefix(range(9)), cache)
    errors = {
        weights: ((hidden[weights] - hidden["float"]).norm(dim=1) / hidden["float"].norm(dim=1)).median()
        for weights in ("int8", "int4")
    }
    # Not worse than in 8 bits: rounding to other codes of 4 bits would be, by several times.
    assert errors["int4"] < 1.3 * errors["int8"] < 0.06
    assert stages["int4"].weights_bytes < 0.85 * stages["int8"].weights_bytes
    manifest, _ = make_manifest(checkpoint, layers, lambda stored: f"{stored.offset:064x}")
    # A router has rows for 64 experts.
    expected = pytest.approx(stages["int4"].weights_bytes, rel=0.05)
    assert stage_bytes(stage_shapes(manifest), "float32", "int4") == expected


def test_its_texts_are_those_of_plain_decoding(mixed: Path) -> None:
    pytest.importorskip("numba")
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=1)
    with LLM(mixed, draft="ngram", stages=2, in_process=True) as llm:
        texts = [llm.generate([5, 6, 7, 5, 6], params, schedule=name).token_ids for name in ("ar", "flow", "serial")]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 20
