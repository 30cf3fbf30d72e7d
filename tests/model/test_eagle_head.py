"""The EAGLE head: its file format, its errors, and that caching changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig

from flowspec.errors import ModelError
from flowspec.model.eagle_head import EagleHead

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
    rewrite(tmp_path, layers__0__input_layernorm__weight=None)
    rewrite(tmp_path, fc__bias=None)
    with pytest.raises(ModelError, match=r"lacks fc\.bias"):
        load(tmp_path, embedding)


def test_a_head_of_another_target_is_refused(head: EagleHead, embedding: torch.Tensor, tmp_path: Path) -> None:
    head.save(tmp_path)
    with pytest.raises(ModelError, match="hidden size 16, the target 8"):
        load(tmp_path, torch.zeros(VOCAB, 8))
    with pytest.raises(ModelError, match="vocabulary of 50, the target of 51"):
        load(tmp_path, torch.zeros(VOCAB + 1, HIDDEN))


@pytest.mark.parametrize("key", ["midlayer__self_attn__q_proj__weight", "d2t", "fc__weight"])
def test_eagle3_heads_are_said_to_be_unsupported(
    head: EagleHead, embedding: torch.Tensor, tmp_path: Path, key: str
) -> None:
    head.save(tmp_path)
    rewrite(tmp_path, **{key: torch.zeros(HIDDEN, 3 * HIDDEN)})
    with pytest.raises(ModelError, match="EAGLE-3"):
        load(tmp_path, embedding)
