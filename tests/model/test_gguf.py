"""GGUF files against the models they were written from, and files that are none."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from command_line import Run
from flowspec import LLM
from flowspec.core import LayerRange, SamplingParams, Weights
from flowspec.errors import ModelError
from flowspec.model.backends import choose_weights, load_stage, open_checkpoint
from flowspec.model.gguf_checkpoint import GGUFCheckpoint
from flowspec.model.stage import forward
from flowspec.model.torch_stage import TorchStage
from tiny_gguf import ARCHITECTURES, rewrite, stored_name, write_gemma_gguf, write_gguf, write_text_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def logits(checkpoint: GGUFCheckpoint, token_ids: list[int]) -> torch.Tensor:
    stage = TorchStage.load(checkpoint, LayerRange(0, checkpoint.num_layers), "float32", "cpu")
    cache = stage.open_cache()
    slots = cache.slots.append_prefix(range(len(token_ids)))
    return forward(stage, torch.tensor(token_ids), slots, cache) @ checkpoint.load_lm_head("float32", "cpu").T


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_is_the_model_that_it_was_written_from(family: str, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", family)
    checkpoint = GGUFCheckpoint.open(tmp_path / "model.gguf")
    tokens = list(range(3, 40))
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    assert torch.allclose(logits(checkpoint, tokens), wanted, atol=1e-4)
    assert checkpoint.own_bits is None and choose_weights(checkpoint, "auto", "cpu") == "float"
    assert checkpoint.max_positions == (128 if family == "phi3" else 256) and checkpoint.title == "model"


def test_scaled_frequencies_of_llama_3_are_found_in_the_file(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = write_gguf(tmp_path / "plain.gguf", rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1 / 10000.0 ** (torch.arange(0, len(scaled)) / len(scaled))
    write_with_factors(tmp_path / "model.gguf", tmp_path / "plain.gguf", (plain / scaled).numpy())
    found = GGUFCheckpoint.open(tmp_path / "model.gguf").config.rope_parameters
    assert {name: found[name] for name in LLAMA3} == pytest.approx(LLAMA3)
    write_with_factors(tmp_path / "odd.gguf", tmp_path / "plain.gguf", np.linspace(1, 7, len(scaled)))
    with pytest.raises(ModelError, match=r"rope_freqs.weight is no scaling of Llama 3; use the model's directory"):
        GGUFCheckpoint.open(tmp_path / "odd.gguf")


def write_with_factors(path: Path, plain: Path, factors: Any) -> None:
    rewrite(path, plain, {}, {"rope_freqs.weight": factors.astype(np.float32)})


@pytest.mark.parametrize(
    ("kind", "own_bits", "exact_bits"),
    [
        (Kind.F16, None, ()),
        (Kind.BF16, None, ()),
        (Kind.Q8_0, 8, (8,)),
        (Kind.Q4_0, 4, (8, 4)),
        (Kind.Q4_1, 4, (4,)),
        (Kind.Q5_0, 8, ()),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else "",
)
def test_numbers_are_the_files_own(
    kind: Kind, own_bits: int | None, exact_bits: tuple[Any, ...], tmp_path: Path
) -> None:
    model = write_gguf(tmp_path / "model.gguf", kind=kind)
    checkpoint = GGUFCheckpoint.open(tmp_path / "model.gguf")
    assert checkpoint.own_bits == own_bits
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight", "lm_head.weight"):
        ((_, tensor),) = checkpoint.tensors([name], "float32", "cpu")
        entry = stored[stored_name(name)]
        assert np.array_equal(tensor.numpy(), gguf.dequantize(entry.data, entry.tensor_type))
        for bits in exact_bits:
            assert torch.equal(checkpoint.packed(name, bits).unpacked(), tensor)
    # Queries and keys have another order in the file.
    query = "model.layers.2.self_attn.q_proj.weight"
    ((_, tensor),) = checkpoint.tensors([query], "float32", "cpu")
    for bits in exact_bits:
        assert torch.equal(checkpoint.packed(query, bits).unpacked(), tensor)
    original = model.state_dict()[query]
    assert (tensor - original).abs().max() < 0.15 * original.abs().max()


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral"])
def test_numbers_of_experts_are_the_files_own(family: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"moe_intermediate_size": 32} if family == "qwen3moe" else {}
    model = write_gguf(tmp_path / "model.gguf", family, Kind.Q8_0, **sizes)
    checkpoint = GGUFCheckpoint.open(tmp_path / "model.gguf")
    assert checkpoint.own_bits == 8 and choose_weights(checkpoint, "auto", "cpu") == "int8"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    gate, up, down = (
        gguf.dequantize(entry.data, entry.tensor_type)
        for entry in (stored[f"blk.1.ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down"))
    )
    names = {kind: f"model.layers.1.mlp.experts.{kind}" for kind in ("gate_up_proj", "down_proj")}
    shapes = {name: tuple(model.state_dict()[name].shape) for name in names.values()}
    found = dict(checkpoint.module_tensors(shapes, "float32", "cpu"))
    assert np.array_equal(found[names["gate_up_proj"]].numpy(), np.concatenate([gate, up], axis=1))
    assert np.array_equal(found[names["down_proj"]].numpy(), down)
    (piece,) = checkpoint.pieces({names["down_proj"]: shapes[names["down_proj"]]})[names["down_proj"]]
    assert np.array_equal(checkpoint.packed(piece.name, 8).unpacked().numpy(), down.reshape(-1, down.shape[2]))
    rows, hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), []
    choices: tuple[Weights, ...] = ("float", "int8")
    for weights in choices:
        stage = load_stage(checkpoint, LayerRange(1, 2), "float32", weights, "cpu")
        cache = stage.open_cache()
        hidden.append(forward(stage, rows, cache.slots.append_prefix(range(9)), cache))
    floats, integers = hidden
    errors = (floats - integers).norm(dim=1) / floats.norm(dim=1)
    assert 0 < errors.median() < 0.03


def test_gemmas_text_is_cut_as_its_own_tokenizer_does(tmp_path: Path) -> None:
    tokens = write_gemma_gguf(tmp_path / "model.gguf")
    with LLM(tmp_path / "model.gguf", stages=2, in_process=True) as llm:
        assert [tokens[i] for i in llm.encode("hello world")] == ["<bos>", "hello", "\u2581world"]
        text = llm.tokenizer.decode(list(llm.encode("hello  w\u00f6rld")))
        assert isinstance(text, str) and text.endswith("hello  w\u00f6rld")
        params = SamplingParams(12, temperature=0.8, seed=1)
        plain = llm.generate("hello", params, schedule="ar").token_ids
        assert llm.generate("hello", params, schedule="flow").token_ids == plain


def test_text_is_cut_as_the_models_own_tokenizer_does(tmp_path: Path) -> None:
    write_text_gguf(tmp_path / "model.gguf")
    checkpoint = GGUFCheckpoint.open(tmp_path / "model.gguf")
    tokenizer: Any = checkpoint.load_tokenizer()
    cut = tokenizer.backend_tokenizer.pre_tokenizer
    assert [word for word, _ in cut.pre_tokenize_str("in 1984 it's")] == ["in", "Ġ", "1", "9", "8", "4", "Ġit", "'s"]
    assert tokenizer.decode(tokenizer("hello world 12").input_ids) == "hello world 12"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<x>"
    assert checkpoint.eos_token_ids == {tokenizer.convert_tokens_to_ids("</s>")}
    assert checkpoint.generation_config == {}


@pytest.mark.parametrize("family", ["smollm3", "granite", "phi3", "qwen3moe"])
def test_every_architecture_brings_its_tokenizer(family: str, tmp_path: Path) -> None:
    write_text_gguf(tmp_path / "model.gguf", family=family)
    with LLM(tmp_path / "model.gguf", stages=2, in_process=True) as llm:
        text = "hello world 12"
        assert llm.tokenizer.decode(list(llm.encode(text))) == text
        plain = llm.generate(text, SamplingParams(8, ignore_eos=True), schedule="ar").token_ids
        assert llm.generate(text, SamplingParams(8, ignore_eos=True), schedule="flow").token_ids == plain


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("refact", ["a", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ġb"]),
        ("smaug-bpe", ["a", "Ġ", "123", "45", "Ċ", "Ġb"]),
        ("gpt-4o", ["a", "Ġ", "123", "45", "Ċ", "Ġb"]),
        ("llama-bpe", ["a", "Ġ", "123", "45", "Ċ", "Ġb"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ġb"]),
        ("default", ["a", "Ġ12345", "Ċ", "Ġb"]),
    ],
)
def test_each_kind_of_cut(pre: str, words: list[str], tmp_path: Path) -> None:
    write_text_gguf(tmp_path / "model.gguf", pre=pre)
    tokenizer: Any = GGUFCheckpoint.open(tmp_path / "model.gguf").load_tokenizer()
    cut = tokenizer.backend_tokenizer.pre_tokenizer
    assert [word for word, _ in cut.pre_tokenize_str("a 12345\n b")] == words


def test_an_unknown_cut_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_text_gguf(tmp_path / "model.gguf", pre="klingon")
    GGUFCheckpoint.open(tmp_path / "model.gguf").load_tokenizer()
    assert "'klingon' of this GGUF file is unknown" in caplog.text


def test_parts_are_one_model(tmp_path: Path) -> None:
    for part in (0, 1):
        model = write_gguf(tmp_path / f"m-0000{part + 1}-of-00002.gguf", split=(part, 2))
    checkpoint = GGUFCheckpoint.open(tmp_path / "m-00001-of-00002.gguf")
    with torch.no_grad():
        wanted = model(torch.tensor([[1, 2, 3]])).logits[0]
    assert torch.allclose(logits(checkpoint, [1, 2, 3]), wanted, atol=1e-4)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-00002.gguf is missing beside it; all 2 parts are needed"):
        GGUFCheckpoint.open(tmp_path / "m-00001-of-00002.gguf")


def test_damaged_files_are_errors_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_text_gguf(path, kind=Kind.Q8_0, num_hidden_layers=1)
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    draw = random.Random(0)
    for length in [0, 3, 4, 8, 15, 23, 24, *(draw.randrange(24, len(whole) - 1) for _ in range(60))]:
        damaged.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"damaged\.gguf"):
            GGUFCheckpoint.open(damaged)
    for _ in range(300):  # most of it is numbers and names that lengths are read from
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            broken[draw.randrange(4, 9000)] = draw.randrange(256)
        damaged.write_bytes(broken)
        with contextlib.suppress(ModelError):
            GGUFCheckpoint.open(damaged)


def test_arrays_in_arrays_are_passed_over_however_deep(tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf", num_hidden_layers=1)
    whole = (tmp_path / "plain.gguf").read_bytes()
    count = int.from_bytes(whole[16:24], "little")
    deep = (4).to_bytes(8, "little") + b"deep" + (9).to_bytes(4, "little")
    deep += ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000
    deep += (0).to_bytes(4, "little") + (4).to_bytes(8, "little") + bytes(4)
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:16] + (count + 1).to_bytes(8, "little") + deep + whole[24:])
    assert len(deep) % 32 == 0  # tensors stay aligned
    assert GGUFCheckpoint.open(path).num_layers == 1


def test_absurd_counts_are_found_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for counts in ((2**60, 1), (1, 2**60), (2**63, 2**63)):
        path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"".join(n.to_bytes(8, "little") for n in counts))
        with pytest.raises(ModelError, match="truncated or damaged"):
            GGUFCheckpoint.open(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "mamba"}, "its architecture is 'mamba', which flowspec cannot read from GGUF"),
        ({"llama.block_count": 7}, "config.json says 7 layers"),
        ({"llama.attention.head_count": 0}, "its metadata says 0 as attention.head_count"),
        ({"llama.embedding_length": 32, "llama.rope.dimension_count": 8}, r"with shape \(\d+, 64\)"),
        ({"llama.rope.dimension_count": 8}, "rotary embeddings turn 8 of the 16 numbers of a head"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 2}, "ffn_down.weight, which config.json has no place"),
        ({"llama.expert_count": 4}, "its metadata says None as expert_used_count"),
        ({"llama.rope.scaling.type": "dynamic"}, "rotary scaling 'dynamic' depends on the length of the text"),
    ],
)
def test_metadata_that_do_not_fit_are_errors(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf")
    rewrite(tmp_path / "model.gguf", tmp_path / "plain.gguf", values)
    with pytest.raises(ModelError, match=message):
        logits(GGUFCheckpoint.open(tmp_path / "model.gguf"), [1])


@pytest.mark.parametrize("name", ["nothing.gguf", "folder.gguf"])
def test_a_name_without_a_file_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ModelError, match=r"is no file here; give the path of a \.gguf file"):
        open_checkpoint(tmp_path / name)


def test_a_chat_model_in_a_file_answers_over_workers(run: Run, tmp_path: Path) -> None:
    write_text_gguf(tmp_path / "model.gguf", kind=Kind.Q8_0)
    command = ["generate", "--model", str(tmp_path / "model.gguf"), "hello", "--stages", "2", "--max-new-tokens", "12"]
    texts = [
        run(*command, "--weights", weights, "--schedule", schedule, "--ignore-eos").out
        for weights, schedule in (("auto", "flow"), ("int8", "ar"))
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 12


def test_integer_weights_that_cannot_be_are_one_line(run: Run, tmp_path: Path) -> None:
    write_text_gguf(tmp_path / "model.gguf", intermediate_size=40)
    command = ["generate", "--model", str(tmp_path / "model.gguf"), "hello", "--stages", "1"]
    refused = run(*command, "--weights", "int4")
    assert refused.code == 2 and "has 40 inputs, which 4-bit kernels cannot take in groups of 32" in refused.err
    refused = run(*command, "--weights", "int2")
    assert refused.code == 2 and "'int2' is not one of" in refused.err
