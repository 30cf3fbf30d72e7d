"""GPTQ, AWQ, compressed-tensors and FP8 checkpoints against the models that they stand for, and broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from flowspec import LLM, SamplingParams
from flowspec.core import LayerRange
from flowspec.errors import ModelError
from flowspec.model.backends import choose_weights, load_stage, open_checkpoint
from flowspec.model.packed import Bits
from flowspec.model.received import make_manifest, stage_shapes
from flowspec.model.stage_size import stage_bytes
from flowspec.train.frozen_target import load_model
from tiny_quantised import FORMS, write_quantised

PROMPT = [5, 9, 2, 7, 7, 1]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
MATRIX = "model.layers.1.mlp.down_proj"

EXACT_BITS: dict[str, tuple[Bits, ...]] = {  # of the integer kernels that hold the codes
    "gptq": (4, 8),
    "gptq, act-order": (),
    "gptq_v2, 8 bits": (8,),
    "awq": (4, 8),
    "pack-quantized": (4, 8),
    "pack-quantized, zero points": (4, 8),
    "int-quantized": (8,),
    "float-quantized": (),
    "fp8": (),
}


@pytest.fixture(scope="module", params=sorted(FORMS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, PreTrainedModel]:
    directory = tmp_path_factory.mktemp("quantised")
    return request.param, directory, write_quantised(directory, request.param)


def test_a_checkpoint_is_the_model_that_it_stands_for(made: tuple[str, Path, PreTrainedModel]) -> None:
    form, directory, model = made
    checkpoint = open_checkpoint(directory)
    wanted = dict(model.named_parameters())
    assert checkpoint.tensor_names() == wanted.keys()
    for name, tensor in checkpoint.tensors(wanted, "float32", "cpu"):
        assert torch.equal(tensor, wanted[name]), name
    matrix = wanted[f"{MATRIX}.weight"]
    for bits in (4, 8):
        packed = checkpoint.packed(f"{MATRIX}.weight", bits)
        assert packed.bits == bits and packed.shape == tuple(matrix.shape)
        assert torch.equal(packed.unpacked(), matrix) == (bits in EXACT_BITS[form]), (
            "rounded again only where it must be"
        )
    own_bits = 4 if 4 in EXACT_BITS[form] else 8
    assert checkpoint.own_bits == own_bits and choose_weights(checkpoint, "auto", "cpu") == f"int{own_bits}"


def test_its_text_is_that_of_the_model(made: tuple[str, Path, PreTrainedModel]) -> None:
    _, directory, model = made
    with torch.no_grad():
        wanted = cast("Any", model).generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[
            0, len(PROMPT) :
        ]
    with LLM(directory, draft="ngram", stages=2, weights="float", in_process=True) as llm:
        assert llm.generate(PROMPT, PARAMS).token_ids == wanted.tolist()


def test_its_texts_in_integers_are_those_of_plain_decoding(made: tuple[str, Path, PreTrainedModel]) -> None:
    pytest.importorskip("numba")
    with LLM(made[1], draft="ngram", stages=3, in_process=True) as llm:
        texts = [llm.generate(PROMPT, PARAMS, schedule=schedule).token_ids for schedule in ("ar", "flow", "lockstep")]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 12


def test_what_a_stage_takes_is_known_from_its_parts(made: tuple[str, Path, PreTrainedModel]) -> None:
    _, directory, _ = made
    checkpoint, layers = open_checkpoint(directory), LayerRange(1, 3)
    manifest, _ = make_manifest(checkpoint, layers, lambda stored: f"{stored.offset:064x}")
    wanted = load_stage(checkpoint, layers, "float32", "float", "cpu").weights_bytes
    assert stage_bytes(stage_shapes(manifest), "float32", "float") == wanted


def test_a_draft_head_can_be_trained_for_it(made: tuple[str, Path, PreTrainedModel]) -> None:
    _, directory, model = made
    loaded = load_model(directory, torch.float32)
    with torch.no_grad():
        found, wanted = (each(input_ids=torch.tensor([PROMPT])).logits for each in cast("list[Any]", [loaded, model]))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("form", ["awq", "fp8"])
def test_experts_are_put_together_of_quantised_ones(tmp_path: Path, form: str) -> None:
    model = write_quantised(tmp_path, form, "qwen3_moe", num_hidden_layers=2, moe_intermediate_size=32)
    wanted = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    for name, tensor in open_checkpoint(tmp_path).module_tensors(shapes, "float32", "cpu"):
        assert torch.equal(tensor, wanted[name]), name
    with LLM(tmp_path, draft="ngram", stages=2, in_process=True) as llm:
        texts = [llm.generate(PROMPT, PARAMS, schedule=schedule).token_ids for schedule in ("ar", "flow")]
    assert texts[0] == texts[1]


# --- what cannot be read ---

Change = Callable[[dict[str, Tensor]], object]


def test_broken_parts_are_told(tmp_path: Path) -> None:
    write_quantised(tmp_path, "gptq")
    whole = load_file(tmp_path / "model.safetensors")

    def error_of(change: Change) -> str:
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            load_stage(open_checkpoint(tmp_path), LayerRange(0, 3), "float32", "float", "cpu")
        return str(caught.value)

    def put(end: str, value: Tensor) -> Change:
        return lambda tensors: tensors.update({f"{MATRIX}.{end}": value})

    words, groups = whole[f"{MATRIX}.qweight"], whole[f"{MATRIX}.g_idx"]
    for change, message in (
        (put("g_idx", groups + 7), "g_idx does not share 64 inputs out among 2 groups"),
        (put("g_idx", groups[:-1].contiguous()), "g_idx does not share"),
        (put("qweight", words.float()), "packed codes are of the type torch.float32"),
        (put("qzeros", whole[f"{MATRIX}.qzeros"][:, :-1].contiguous()), "words of 32 bits for 32 codes"),
        (put("scales", whole[f"{MATRIX}.scales"][0]), "makes no GPTQ weight"),
        (put("qweight", words[:-1].contiguous()), "g_idx does not share 56 inputs"),
        (lambda tensors: tensors.pop(f"{MATRIX}.scales"), f"holds {MATRIX}.g_idx, which config.json has no place for"),
    ):
        assert message in error_of(change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes', which cannot be read; take one of GPTQ"),
        ({"quant_method": "mxfp4"}, "quantised by 'mxfp4'"),
        ({}, "quantised by None"),
        ("gptq", "must be an object"),
        ({"quant_method": "awq", "version": "gemv"}, "says version 'gemv', which cannot be read; known are gemm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"quant_method": "compressed-tensors", "quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"blocks of \[128\]"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, config: Any, message: str) -> None:
    write_quantised(tmp_path, "gptq", num_hidden_layers=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


def test_codes_without_a_word_in_the_config_are_refused(tmp_path: Path) -> None:
    write_quantised(tmp_path, "int-quantized", num_hidden_layers=1)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has no place for|of which config.json says nothing"):
        load_stage(open_checkpoint(tmp_path), LayerRange(0, 1), "float32", "float", "cpu")
