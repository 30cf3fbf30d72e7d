"""A tiny random MTP layer in exactly the published form of MiMo-7B, and its arithmetic written out once more.

The arithmetic is plain torch after XiaomiMiMo's layer in vLLM (``mimo_mtp.py``), and shares nothing with the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PREFIX = "model.mtp_layers."
INDEX, WHOLE, SHARD = "model.safetensors.index.json", "model.safetensors", "model-mtp.safetensors"


def make_mtp_weights(config: Mapping[str, Any], seed: int = 2) -> dict[str, Tensor]:
    """Of one layer, by their names behind ``model.mtp_layers.0.``; ``config``: the model's."""
    generator = torch.Generator().manual_seed(seed)
    size, inner, heads, kv_heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    width = size // heads

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    def norm() -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    weights = {f"{name}_layernorm.weight": norm() for name in ("token", "hidden", "input", "post_attention", "final")}
    weights["input_proj.weight"] = matrix(size, 2 * size)
    for name, outputs in {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}.items():
        weights[f"self_attn.{name}_proj.weight"] = matrix(outputs, size)
        weights[f"self_attn.{name}_proj.bias"] = matrix(outputs)
    weights["self_attn.o_proj.weight"] = matrix(size, heads * width)
    for name, shape in {"gate": (inner, size), "up": (inner, size), "down": (size, inner)}.items():
        weights[f"mlp.{name}_proj.weight"] = matrix(*shape)
    return weights


def write_as_mimo(directory: Path, num_mtp_layers: int = 1) -> None:
    """Make a saved Qwen2 model one of MiMo's: its config says so, and it has MTP layers, with random weights."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    assert rope["rope_type"] == "default"
    config |= {
        "model_type": "mimo",
        "architectures": ["MiMoForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mimo.MiMoConfig",
            "AutoModel": "modeling_mimo.MiMoModel",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        },
        "attention_bias": True,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "num_nextn_predict_layers": num_mtp_layers,
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": config.pop("dtype"),
    }
    for name in ("layer_types", "sliding_window"):
        config.pop(name)  # of newer files than MiMo's
    path.write_text(json.dumps(config))
    # Nobody may run what lies beside a model.
    (directory / "configuration_mimo.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
    (directory / "modeling_mimo.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
    write_mtp(directory, num_mtp_layers)


def write_characters(directory: Path) -> None:
    """A tokenizer of MiMo's kind, Qwen2's, with 96 tokens: ASCII's characters, a space and the end of a line."""
    vocabulary = {character: place for place, character in enumerate([*map(chr, range(33, 127)), "Ġ", "Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 256}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_mtp(directory: Path, num_layers: int = 1, changes: Mapping[str, Tensor | None] | None = None) -> None:
    """Add MTP layers to a model's files, or change what they have: ``changes`` by name, without the prefix; or drop."""
    config = json.loads((directory / "config.json").read_text())
    tensors: dict[str, Tensor | None] = {
        f"{PREFIX}{layer}.{name}": tensor
        for layer in range(num_layers)
        for name, tensor in make_mtp_weights(config, seed=2 + layer).items()
    }
    tensors |= {PREFIX + name: tensor for name, tensor in (changes or {}).items()}
    stored = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    index = directory / INDEX
    if not index.is_file():
        kept = {name: tensor for name, tensor in load_file(directory / WHOLE).items() if not name.startswith(PREFIX)}
        save_file(kept | stored, directory / WHOLE, {"format": "pt"})
        return
    value = json.loads(index.read_text())
    kept_map = {name: shard for name, shard in value["weight_map"].items() if not name.startswith(PREFIX)}
    value["weight_map"] = kept_map | dict.fromkeys(stored, SHARD)
    index.write_text(json.dumps(value))
    (directory / SHARD).unlink(missing_ok=True)
    if stored:
        save_file(stored, directory / SHARD, {"format": "pt"})


# --- the published arithmetic ---


class MtpReference:
    """The layer over one text, without a cache; ``config``: the model's."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], embedding: Tensor) -> None:
        self.config, self.weights, self.embedding = config, weights, embedding

    def states(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """Row i has token i + 1 of a text, and what leaves the model's layers at token i, before its last norm [T, H].

        [T, H]: the lm_head's input, and what rows behind the last token are fed with.
        """
        weights, (num, size) = self.weights, hidden.shape
        positions = torch.arange(num)
        embedded = self.embedding[token_ids] * (positions > 0)[:, None]
        rows = torch.cat([self._rms(hidden, "hidden_layernorm"), self._rms(embedded, "token_layernorm")], dim=-1)
        rows = rows @ weights["input_proj.weight"].T
        normed, width = self._rms(rows, "input_layernorm"), size // self.config["num_attention_heads"]
        query, key, value = (
            F.linear(normed, weights[f"self_attn.{name}_proj.weight"], weights[f"self_attn.{name}_proj.bias"])
            for name in "qkv"
        )
        query, key, value = (part.view(num, -1, width) for part in (query, key, value))
        query, key = self._turned(query, positions), self._turned(key, positions)
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query, key) / width**0.5
        scores = scores.masked_fill(torch.ones(num, num, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", scores, value).flatten(1)
        rows = rows + mixed @ weights["self_attn.o_proj.weight"].T
        normed = self._rms(rows, "post_attention_layernorm")
        gate, up = (normed @ weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        rows = rows + (F.silu(gate) * up) @ weights["mlp.down_proj.weight"].T
        return self._rms(rows, "final_layernorm")

    def _rms(self, rows: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return rows * scale * self.weights[f"{name}.weight"]

    def _turned(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of [T, heads, d]."""
        half = rows.shape[-1] // 2
        angles = positions[:, None].float() * self.config["rope_theta"] ** (-torch.arange(half).float() / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        left, right = rows[..., :half], rows[..., half:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
