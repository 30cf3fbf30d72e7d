"""The EAGLE head: its file format, its errors, and that caching changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig

from flowspec.errors import ModelError
from flowspec.model.draft_files import DraftFiles
from flowspec.model.eagle_head import EagleHead
from flowspec.model.head_kind import kind_of

VOCAB, HIDDEN = 50, 16


def tiny_config(**changes: object) -> LlamaConfig:
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def head(embedding: torch.Tensor) -> EagleHead:
    torch.manual_seed(0)
    return EagleHead(tiny_config(), embedding).eval()


def inputs(num_rows: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, features, positions, causal mask."""
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(VOCAB, (batch, num_rows), generator=generator)
    features = torch.randn(batch, num_rows, HIDDEN, generator=generator)
    mask = torch.ones(num_rows, num_rows, dtype=torch.bool).tril()[None, None]
    return token_ids, features, torch.arange(num_rows).expand(batch, -1), mask


def load(directory: Path, embedding: torch.Tensor) -> EagleHead:
    return EagleHead.load(directory, embedding, "float32", "cpu")


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or drop, with None) tensors of a saved head; dots are written as double underscores."""
    path = directory / "model.safetensors"
    weights: dict[str, torch.Tensor] = load_file(path)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, path)


def test_a_saved_head_has_the_published_names_and_comes_back_the_same(
    head: EagleHead, embedding: torch.Tensor, tmp_path: Path
) -> None:
    head.save(tmp_path, torch.float32)
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "fc.weight",
        "fc.bias",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight",
        "layers.0.self_attn.o_proj.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "layers.0.post_attention_layernorm.weight",
    }
    loaded = load(tmp_path, embedding)
    assert torch.equal(loaded(*inputs(5)), head(*inputs(5)))
    assert loaded.embedding is embedding or loaded.embedding.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_bin_file_without_bias_key_and_with_extras_loads(
    head: EagleHead, embedding: torch.Tensor, tmp_path: Path, is_zip: bool
) -> None:
    head.save(tmp_path, torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path, embedding)(*inputs(5)), head(*inputs(5)))


def test_heads_without_fc_bias_and_with_projection_biases_come_back(embedding: torch.Tensor, tmp_path: Path) -> None:
    head = EagleHead(tiny_config(bias=False, qkv_bias=True), embedding).eval()
    assert head.fc.bias is None
    head.save(tmp_path, torch.float32)
    assert "layers.0.self_attn.q_proj.bias" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path, embedding)(*inputs(5)), head(*inputs(5)))


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BIASED = tuple(f"layers.0.self_attn.{name}_proj" for name in "qkvo")


@pytest.mark.parametrize("biased", [(), BIASED[:3], BIASED, BIASED[2:3]], ids=["none", "qkv", "qkvo", "v"])
@pytest.mark.parametrize("flag", [True, False, None])
def test_the_file_says_which_projections_have_a_bias(
    embedding: torch.Tensor, tmp_path: Path, biased: tuple[str, ...], flag: bool | None
) -> None:
    """Configs that are copies of a Qwen2 target's said nothing of biases that were there, and the reverse."""
    head = EagleHead(tiny_config(), embedding, {"fc", *biased}).eval()
    head.save(tmp_path, torch.float32)
    assert {f"{name}.bias" for name in biased} <= load_file(tmp_path / "model.safetensors").keys()
    change_config(tmp_path, qkv_bias=flag, attention_bias=bool(flag))
    assert torch.equal(load(tmp_path, embedding)(*inputs(5)), head(*inputs(5)))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_the_file_says_whether_fc_has_a_bias(
    embedding: torch.Tensor, tmp_path: Path, has_bias: bool, flag: bool
) -> None:
    head = EagleHead(tiny_config(bias=has_bias), embedding).eval()
    head.save(tmp_path, torch.float32)
    change_config(tmp_path, bias=flag)
    loaded = load(tmp_path, embedding)
    assert (loaded.fc.bias is not None) == has_bias
    assert torch.equal(loaded(*inputs(5)), head(*inputs(5)))


def test_a_saved_config_speaks_of_the_biases_that_the_file_has(embedding: torch.Tensor, tmp_path: Path) -> None:
    """EAGLE's own code reads ``bias`` and ``qkv_bias`` from there."""
    EagleHead(tiny_config(), embedding, set(BIASED[:3])).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bias"], config["qkv_bias"], config["attention_bias"]) == (False, True, False)


@pytest.mark.parametrize("size", [4, 8])  # EAGLE's rule, and a target's whose heads are wider than that
@pytest.mark.parametrize("said", [None, 2, 8, 128])
def test_the_file_says_how_large_an_attention_head_is(
    embedding: torch.Tensor, tmp_path: Path, size: int, said: int | None
) -> None:
    head = EagleHead(tiny_config(head_dim=size), embedding).eval()
    head.save(tmp_path, torch.float32)
    change_config(tmp_path, head_dim=said)
    loaded = load(tmp_path, embedding)
    assert loaded.config.head_dim == size
    assert torch.equal(loaded(*inputs(5)), head(*inputs(5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"k_proj\.weight has shape \[8, 16\], but \[16, 16\] is needed"),
        ({"num_attention_heads": 8}, r"k_proj\.weight has shape \[8, 16\], but \[4, 16\] is needed"),
        ({"intermediate_size": 32}, r"gate_proj\.weight has shape \[24, 16\], but \[32, 16\] is needed"),
    ],
)
def test_shapes_that_fit_nothing_are_named_with_the_file_and_what_to_do(
    head: EagleHead, embedding: torch.Tensor, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    head.save(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=rf"model\.safetensors: layers\.0\.\w+\.{message}; .* fetch the head again"):
        load(tmp_path, embedding)


@pytest.mark.parametrize("shape", [(18, 16), (12, 16), (16,), ()])
def test_queries_that_are_no_whole_heads_are_named(
    head: EagleHead, embedding: torch.Tensor, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    head.save(tmp_path)
    rewrite(tmp_path, layers__0__self_attn__q_proj__weight=torch.zeros(shape))
    with pytest.raises(ModelError, match=rf"q_proj\.weight has shape {re.escape(str(list(shape)))}, but \[16, 16\]"):
        load(tmp_path, embedding)


def test_llama3_scaling_is_applied_as_transformers_does_for_the_target(embedding: torch.Tensor, tmp_path: Path) -> None:
    rope: dict[str, object] = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    head = EagleHead(tiny_config(rope_parameters=rope), embedding).eval()
    frequencies = head.rotary_emb.inv_freq
    # As the target's: fast ones stay, those slower than once in the original length are slowed by the factor.
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 500000.0**-0.5 / 8]))
    head.save(tmp_path, torch.float32)
    assert torch.equal(load(tmp_path, embedding).rotary_emb.inv_freq, frequencies)
    # In the words of configs before transformers 5, as published ones have it.
    change_config(tmp_path, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    loaded = load(tmp_path, embedding)
    assert torch.equal(loaded.rotary_emb.inv_freq, frequencies)
    assert torch.equal(loaded(*inputs(5)), head(*inputs(5)))
    change_config(tmp_path, rope_scaling=None)  # as EAGLE's own heads for such targets have it
    assert load(tmp_path, embedding).rotary_emb.inv_freq[1].item() == pytest.approx(500000.0**-0.5)


def test_linear_scaling_is_over_the_configs_theta(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    head.save(tmp_path)
    scaling = {"type": "linear", "factor": 2.0}
    change_config(tmp_path, rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)
    loaded = load(tmp_path, embedding).rotary_emb.inv_freq
    torch.testing.assert_close(loaded, torch.tensor([0.5, 500000.0**-0.5 / 2]))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "twisted", "factor": 2.0}, "'twisted' is unknown; known are linear, "),
        ({"rope_type": "llama3", "factor": 8.0}, "no valid model config .*Missing required keys"),
    ],
)
def test_rotary_scaling_that_nobody_knows_is_named(
    head: EagleHead, embedding: torch.Tensor, tmp_path: Path, scaling: dict[str, object], message: str
) -> None:
    head.save(tmp_path)
    change_config(tmp_path, rope_parameters=None, rope_scaling=scaling)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, embedding)


def test_an_old_config_keeps_its_rope_theta(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    head.save(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0, "model_type": "qwen2"}))
    base = load(tmp_path, embedding).rotary_emb.inv_freq[1].item() ** -2
    assert base == pytest.approx(500000.0, rel=1e-4)


def test_an_embedding_in_the_file_wins(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    head.save(tmp_path, torch.float32)
    rewrite(tmp_path, embed_tokens__weight=embedding + 1)
    assert torch.equal(load(tmp_path, embedding).embedding, embedding + 1)


def test_cached_rows_one_by_one_equal_the_full_forward(head: EagleHead) -> None:
    token_ids, features, positions, mask = inputs(7, batch=2)
    with torch.no_grad():
        full = head(token_ids, features, positions, mask)
        cache = DynamicCache()
        for i in range(7):
            one = slice(i, i + 1)
            row = head(token_ids[:, one], features[:, one], positions[:, one], mask[:, :, one, : i + 1], cache)
            torch.testing.assert_close(row, full[:, one])


def test_a_mask_hides_rows(head: EagleHead) -> None:
    token_ids, features, positions, mask = inputs(4)
    alone = head(token_ids[:, 3:], features[:, 3:], positions[:, 3:], mask[:, :, :1, :1])
    only_itself = torch.eye(4, dtype=torch.bool)[None, None]
    torch.testing.assert_close(head(token_ids, features, positions, only_itself)[:, 3:], alone)


def test_one_row_is_computed_as_published(head: EagleHead) -> None:
    """Against the layer written out; a row that sees itself alone attends to its own values."""
    token_ids, features, positions, mask = inputs(1)
    weights = dict(head.named_parameters())
    both = torch.cat([head.embedding[token_ids[0, 0]], features[0, 0]])
    hidden = weights["fc.weight"] @ both + weights["fc.bias"]
    values = (weights["layers.0.self_attn.v_proj.weight"] @ hidden).view(2, 4).repeat_interleave(2, dim=0).flatten()
    hidden = hidden + weights["layers.0.self_attn.o_proj.weight"] @ values
    normed = hidden * torch.rsqrt(hidden.square().mean() + head.config.rms_norm_eps)
    normed = normed * weights["layers.0.post_attention_layernorm.weight"]
    gate = torch.nn.functional.silu(weights["layers.0.mlp.gate_proj.weight"] @ normed)
    up = weights["layers.0.mlp.up_proj.weight"] @ normed
    expected = hidden + weights["layers.0.mlp.down_proj.weight"] @ (gate * up)
    torch.testing.assert_close(head(token_ids, features, positions, mask)[0, 0], expected)


def test_a_head_loads_in_half_precision(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    head.save(tmp_path)
    loaded = EagleHead.load(tmp_path, embedding.bfloat16(), "bfloat16", "cpu")
    token_ids, features, positions, mask = inputs(5)
    estimate = loaded(token_ids, features.bfloat16(), positions, mask)
    assert estimate.dtype == torch.bfloat16
    torch.testing.assert_close(estimate.float(), head(token_ids, features, positions, mask), atol=0.05, rtol=0.1)


def test_what_is_missing_or_broken_is_named(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path, embedding)
    head.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load(tmp_path, embedding)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has neither"):
        load(tmp_path, embedding)
    (tmp_path / "pytorch_model.bin").write_bytes(b"half a file")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is truncated"):
        load(tmp_path, embedding)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is no valid model config"):
        load(tmp_path, embedding)


def test_missing_unknown_and_misshapen_ones_are_named(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    head.save(tmp_path)
    rewrite(tmp_path, fc__bias=torch.zeros(HIDDEN + 1))
    with pytest.raises(ModelError, match=r"fc\.bias has shape \[17\]"):
        load(tmp_path, embedding)
    rewrite(tmp_path, fc__bias=torch.zeros(HIDDEN), layers__0__input_layernorm__weight=torch.ones(HIDDEN))
    with pytest.raises(ModelError, match=r"unknown tensors layers\.0\.input_layernorm"):
        load(tmp_path, embedding)
    rewrite(tmp_path, layers__0__input_layernorm__weight=None, fc__weight=None)
    with pytest.raises(ModelError, match=r"lacks fc\.weight"):
        load(tmp_path, embedding)


def test_a_head_of_another_target_is_refused(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    head.save(tmp_path)
    with pytest.raises(ModelError, match="hidden size 16, the target 8"):
        load(tmp_path, torch.zeros(VOCAB, 8))
    with pytest.raises(ModelError, match="vocabulary of 50, the target of 51"):
        load(tmp_path, torch.zeros(VOCAB + 1, HIDDEN))


@pytest.mark.parametrize("key", ["midlayer__hidden_norm__weight", "d2t", "fc__weight"])
def test_eagle3_heads_are_told_apart(head: EagleHead, tmp_path: Path, key: str) -> None:
    head.save(tmp_path)
    assert kind_of(DraftFiles(tmp_path)) == "eagle"
    rewrite(tmp_path, **{key: torch.zeros(HIDDEN, 3 * HIDDEN)})
    assert kind_of(DraftFiles(tmp_path)) == "eagle3"
