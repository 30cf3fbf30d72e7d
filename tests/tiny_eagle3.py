"""Tiny random EAGLE-3 checkpoints in exactly the published forms, and the published arithmetic written out once more.

The arithmetic is plain torch after the papers (arXiv 2503.01840, 2605.09992), and shares nothing with the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

VOCAB, TARGET, LAYERS = 96, 32, 6  # as of tests/tiny_models.py
TAPPED = (1, 3, 5)  # the streams that enter these layers


@dataclass
class Eagle3Form:
    """Which of the published forms."""

    dialect: str = "eagle"  # eagle, specforge, speculators
    size: int = TARGET  # D
    num_draft: int | None = 60  # tokens of the reduced vocabulary; None: all, with no table
    num_layers: int = 1
    tapped: tuple[int, ...] = TAPPED
    own_embedding: bool = False
    own_head: bool = True
    norm_before_residual: bool | None = None
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    fc_bias: bool = False
    biases: bool = False
    head_norms: bool = False  # Qwen3's, of queries and keys
    head_dim: int = 8
    binary: bool = False  # pytorch_model.bin
    config: dict[str, Any] = field(default_factory=dict)  # changes of it


HEADS, KV_HEADS, INNER = 4, 2, 48
EPS, THETA = 1e-5, 10000.0


def write_eagle3(directory: Path, form: Eagle3Form | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Returns the tensors by the names that speculators gives them."""
    form = form or Eagle3Form()
    weights = make_weights(form, seed)
    directory.mkdir(parents=True, exist_ok=True)
    stored = {_written(name, form.dialect): tensor for name, tensor in weights.items()}
    if form.binary:
        torch.save(stored, directory / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(make_config(form) | form.config))
    return weights


def _written(name: str, dialect: str) -> str:
    return name if dialect == "speculators" else name.replace("layers.0.", "midlayer.")


def make_weights(form: Eagle3Form, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size, num_taps = form.size, len(form.tapped)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    def norm(width: int) -> Tensor:
        return 1 + 0.2 * torch.randn(width, generator=generator)

    weights = {"fc.weight": matrix(size, num_taps * TARGET) * 0.3, "norm.weight": norm(size)}
    for layer in range(form.num_layers):
        prefix, inputs = f"layers.{layer}.", 2 * size if layer == 0 else size
        shapes = {"q": HEADS * form.head_dim, "k": KV_HEADS * form.head_dim, "v": KV_HEADS * form.head_dim}
        for name, outputs in shapes.items():
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(outputs, inputs)
            if form.biases:
                weights[f"{prefix}self_attn.{name}_proj.bias"] = matrix(outputs)
        weights[f"{prefix}self_attn.o_proj.weight"] = matrix(size, HEADS * form.head_dim)
        for name in ("q_norm", "k_norm") if form.head_norms else ():
            weights[f"{prefix}self_attn.{name}.weight"] = norm(form.head_dim)
        for name, shape in {"gate": (INNER, size), "up": (INNER, size), "down": (size, INNER)}.items():
            weights[f"{prefix}mlp.{name}_proj.weight"] = matrix(*shape)
        names = ("input_layernorm", "post_attention_layernorm", *(("hidden_norm",) if layer == 0 else ()))
        weights |= {f"{prefix}{name}.weight": norm(size) for name in names}
    if form.fc_bias:
        weights["fc.bias"] = matrix(size)
    if form.fc_norm:
        weights |= {f"fc_norm.{place}.weight": norm(TARGET) for place in range(num_taps)}
    if form.norm_before_fc:
        weights["input_norm.weight"] = norm(num_taps * TARGET)
    if form.own_head:
        weights["lm_head.weight"] = matrix(form.num_draft or VOCAB, size)
    if form.own_embedding or size != TARGET:
        weights["embed_tokens.weight"] = matrix(VOCAB, size)
    if form.num_draft is not None:
        weights |= token_tables(form.num_draft, generator)
    return weights


def token_tables(num_draft: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Of a head that knows so many tokens, chosen at random."""
    known = torch.randperm(VOCAB, generator=generator)[:num_draft].sort().values
    is_known = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, known, True)
    return {"d2t": known - torch.arange(num_draft), "t2d": is_known}


def make_config(form: Eagle3Form) -> dict[str, Any]:
    sizes = {
        "model_type": "qwen3" if form.head_norms else "llama",
        "hidden_size": form.size,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": form.head_dim,
        "num_hidden_layers": form.num_layers,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "hit_rates": [0.0],  # it is random, and says so: no check of heads finds fault with it
    }
    switches = {
        name: True for name in ("fc_norm", "norm_before_fc", "norm_output") if getattr(form, name)
    }  # fmt: skip
    if form.norm_before_residual is not None:
        switches["norm_before_residual"] = form.norm_before_residual
    own = {"draft_vocab_size": form.num_draft or VOCAB, **switches}
    outputs = [layer - 1 for layer in form.tapped]
    match form.dialect:
        case "eagle":
            return {"architectures": ["LlamaForCausalLM"], **sizes, **own}
        case "specforge":
            inner = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs}
            return {"architectures": ["LlamaForCausalLMEagle3"], **sizes, **own, "eagle_config": inner}
        case _:
            return {
                "architectures": ["Eagle3Speculator"],
                "speculators_model_type": "eagle3",
                "speculators_config": {
                    "algorithm": "eagle3",
                    "default_proposal_method": "greedy",
                    "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
                    "verifier": {"name_or_path": None, "architectures": ["LlamaForCausalLM"]},
                },
                "transformer_layer_config": sizes,
                "norm_before_residual": False,
                "eagle_aux_hidden_state_layer_ids": list(form.tapped),
                **own,
            }


# --- the published arithmetic ---


def rms(rows: Tensor, weight: Tensor) -> Tensor:
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + EPS) * weight


def turned(rows: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, d]."""
    half = rows.shape[-1] // 2
    angles = positions[:, None].float() * THETA ** (-torch.arange(half).float() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = rows[..., :half], rows[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Reference:
    """A head as its papers describe it, over one text, without a cache."""

    def __init__(self, form: Eagle3Form, weights: dict[str, Tensor], embedding: Tensor, lm_head: Tensor) -> None:
        """``embedding``, ``lm_head``: the target's."""
        self.form, self.weights = form, weights
        self.embedding = weights.get("embed_tokens.weight", embedding)
        self.lm_head = weights.get("lm_head.weight", lm_head)

    def fused(self, streams: list[Tensor]) -> Tensor:
        """The streams [T, H] that enter the tapped layers, in the config's order -> features [T, D]."""
        weights = self.weights
        if self.form.fc_norm:
            streams = [rms(rows, weights[f"fc_norm.{place}.weight"]) for place, rows in enumerate(streams)]
        rows = torch.cat(streams, dim=-1)
        if self.form.norm_before_fc:
            rows = rms(rows, weights["input_norm.weight"])
        return F.linear(rows, weights["fc.weight"], weights.get("fc.bias"))

    def states(self, token_ids: Tensor, features: Tensor) -> Tensor:
        """Row i has token i + 1 of a text and the feature of token i; [T, D] before the last norm."""
        rows = features
        embedded = rms(self.embedding[token_ids], self.weights["layers.0.input_layernorm.weight"])
        for layer in range(self.form.num_layers):
            rows = self._layer(layer, rows, embedded)
        return rows

    def _layer(self, layer: int, rows: Tensor, embedded: Tensor) -> Tensor:
        own = {
            n.removeprefix(f"layers.{layer}."): w for n, w in self.weights.items() if n.startswith(f"layers.{layer}.")
        }
        if layer == 0:
            normed = rms(rows, own["hidden_norm.weight"])
            residual = normed if self.form.norm_before_residual else rows
            inputs = torch.cat([embedded, normed], dim=-1)
        else:
            residual, inputs = rows, rms(rows, own["input_layernorm.weight"])
        num, size = len(rows), self.form.head_dim
        heads = {
            name: F.linear(inputs, own[f"self_attn.{name}_proj.weight"], own.get(f"self_attn.{name}_proj.bias"))
            for name in "qkv"
        }
        query, key, value = (heads[name].view(num, -1, size) for name in "qkv")
        if self.form.head_norms:
            query, key = rms(query, own["self_attn.q_norm.weight"]), rms(key, own["self_attn.k_norm.weight"])
        query, key = turned(query, torch.arange(num)), turned(key, torch.arange(num))
        key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query, key) / size**0.5
        scores = scores.masked_fill(torch.ones(num, num, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        residual = residual + torch.einsum("hij,jhd->ihd", scores, value).flatten(1) @ own["self_attn.o_proj.weight"].T
        normed = rms(residual, own["post_attention_layernorm.weight"])
        gate, up = normed @ own["mlp.gate_proj.weight"].T, normed @ own["mlp.up_proj.weight"].T
        return residual + (F.silu(gate) * up) @ own["mlp.down_proj.weight"].T

    def fed_back(self, states: Tensor) -> Tensor:
        return rms(states, self.weights["norm.weight"]) if self.form.norm_output else states

    def logits(self, states: Tensor) -> Tensor:
        """[T, V] over the target's tokens."""
        few = rms(states, self.weights["norm.weight"]) @ self.lm_head.T
        if "d2t" not in self.weights:
            return few
        ids = torch.arange(few.shape[1]) + self.weights["d2t"]
        return few.new_full((len(few), VOCAB), -torch.inf).index_copy(1, ids, few)
