"""Tiny random DFlash checkpoints in the published forms, and the published arithmetic written out once more.

The arithmetic is plain torch after arXiv 2602.06036, without a cache, and shares nothing with the package.
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

from tiny_eagle3 import EPS, HEADS, INNER, KV_HEADS, LAYERS, TAPPED, TARGET, THETA, VOCAB, rms, token_tables, turned

MASK, HEAD_DIM = VOCAB - 1, 8


@dataclass
class DFlashForm:
    """Which of the published forms."""

    dialect: str = "z-lab"  # z-lab, z-lab-nested, speculators
    block_size: int = 8
    num_layers: int = 2
    tapped: tuple[int, ...] = TAPPED
    num_draft: int | None = None  # tokens of a reduced vocabulary, with its own lm_head
    samples_anchor: bool = False
    own_embedding: bool = False
    window: int | None = None  # of the last layer
    is_causal: bool = True  # of a layer with a window
    config: dict[str, Any] = field(default_factory=dict)  # changes of it

    @property
    def num_levels(self) -> int:
        return self.block_size - (not self.samples_anchor)


def write_dflash(directory: Path, form: DFlashForm | None = None, seed: int = 1, **more: Tensor) -> dict[str, Tensor]:
    """``more``: tensors to add, ``__`` for a dot. Returns the tensors."""
    form = form or DFlashForm()
    weights = make_weights(form, seed)
    write_head(directory, weights, make_config(form) | form.config, more)
    return weights


def write_head(directory: Path, weights: dict[str, Tensor], config: dict[str, Any], more: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stored = weights | {name.replace("__", "."): tensor for name, tensor in more.items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def make_weights(form: DFlashForm, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    def norm(width: int) -> Tensor:
        return 1 + 0.2 * torch.randn(width, generator=generator)

    weights = {"fc.weight": matrix(TARGET, len(form.tapped) * TARGET) * 0.3}
    weights |= {"hidden_norm.weight": norm(TARGET), "norm.weight": norm(TARGET)}
    for layer in range(form.num_layers):
        prefix = f"layers.{layer}."
        for name, heads in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items():
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(heads * HEAD_DIM, TARGET)
        weights[f"{prefix}self_attn.o_proj.weight"] = matrix(TARGET, HEADS * HEAD_DIM)
        weights |= {f"{prefix}self_attn.{name}.weight": norm(HEAD_DIM) for name in ("q_norm", "k_norm")}
        for name, shape in {"gate": (INNER, TARGET), "up": (INNER, TARGET), "down": (TARGET, INNER)}.items():
            weights[f"{prefix}mlp.{name}_proj.weight"] = matrix(*shape)
        weights |= {f"{prefix}{name}.weight": norm(TARGET) for name in ("input_layernorm", "post_attention_layernorm")}
    if form.own_embedding:
        weights["embed_tokens.weight"] = matrix(VOCAB, TARGET)
    if form.num_draft is not None:
        weights |= token_tables(form.num_draft, generator)
        weights["lm_head.weight"] = matrix(form.num_draft, TARGET)
    return weights


def make_config(form: DFlashForm) -> dict[str, Any]:
    sizes = {
        "model_type": "qwen3",
        "hidden_size": TARGET,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": form.num_layers,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
    }
    outputs = [layer - 1 for layer in form.tapped]
    if form.window is not None:
        types = ["full_attention"] * (form.num_layers - 1) + ["sliding_attention"]
        sizes |= {"layer_types": types, "sliding_window": form.window, "use_sliding_window": True}
    if form.dialect == "speculators":
        return {
            "sliding_window_non_causal": not form.is_causal,
            "architectures": ["DFlashSpeculator"],
            "speculators_model_type": "dflash",
            "transformer_layer_config": sizes,
            "aux_hidden_state_layer_ids": list(form.tapped),
            "block_size": form.block_size,
            "mask_token_id": MASK,
            "sample_from_anchor": form.samples_anchor,
            "draft_vocab_size": form.num_draft or VOCAB,
        }
    inner: dict[str, Any] = {"target_layer_ids": outputs, "mask_token_id": MASK}
    own = {"architectures": ["DFlashDraftModel"], **sizes, "num_target_layers": LAYERS}
    own |= {} if form.is_causal else {"is_causal": False}
    if form.dialect == "z-lab":
        return {**own, "block_size": form.block_size, "dflash_config": inner}
    return {**own, "dflash_config": {**inner, "block_size": form.block_size}}


class Reference:
    """A head as its paper describes it: all of the text and the block in one forward."""

    def __init__(self, form: DFlashForm, weights: dict[str, Tensor], embedding: Tensor, lm_head: Tensor) -> None:
        """``embedding``, ``lm_head``: the target's."""
        self.form, self.weights = form, weights
        self.embedding = weights.get("embed_tokens.weight", embedding)
        self.lm_head = weights.get("lm_head.weight", lm_head)

    def logits(self, streams: list[Tensor], token_id: int) -> Tensor:
        """``streams`` [T, H] each, that enter the tapped layers, of the text before the anchor ``token_id``.

        Returns [levels, V] over the target's tokens.
        """
        return self.spread(self.rows(streams, token_id) @ self.lm_head.T)

    def rows(self, streams: list[Tensor], token_id: int) -> Tensor:
        """What the levels' logits are made of, [levels, D]."""
        weights = self.weights
        text = rms(F.linear(torch.cat(streams, dim=-1), weights["fc.weight"]), weights["hidden_norm.weight"])
        rows = self.embedding[torch.tensor([token_id] + [MASK] * (self.form.block_size - 1))]
        for layer in range(self.form.num_layers):
            rows = self._layer(layer, rows, text)
        return rms(rows, weights["norm.weight"])[-self.form.num_levels :]

    def spread(self, few: Tensor) -> Tensor:
        """[n, N] -> [n, V]."""
        if "d2t" not in self.weights:
            return few
        ids = torch.arange(few.shape[1]) + self.weights["d2t"]
        return few.new_full((len(few), VOCAB), -torch.inf).index_copy(1, ids, few)

    def _sees(self, layer: int, num_text: int) -> Tensor:
        """Bool [block, text and block]."""
        form = self.form
        rows, keys = torch.arange(form.block_size)[:, None] + num_text, torch.arange(num_text + form.block_size)
        sees = torch.ones(form.block_size, len(keys), dtype=torch.bool)
        if form.window is None or layer < form.num_layers - 1:
            return sees
        first = num_text - form.window if form.dialect == "speculators" else rows - form.window + 1
        return sees & (keys >= first) & ((keys <= rows) | (not form.is_causal))

    def _layer(self, layer: int, rows: Tensor, text: Tensor) -> Tensor:
        prefix = f"layers.{layer}."
        attention, mlp = f"{prefix}attention", f"{prefix}mlp"
        own = {name.removeprefix(prefix): tensor for name, tensor in self.weights.items() if name.startswith(prefix)}
        normed = rms(rows, own["input_layernorm.weight"])
        inputs = self.mixed(attention, 0, normed, normed)
        both, start, end = torch.cat([text, inputs]), len(text), len(text) + len(rows)
        query = (inputs @ own["self_attn.q_proj.weight"].T).view(len(rows), HEADS, HEAD_DIM)
        key, value = (
            (both @ own[f"self_attn.{name}_proj.weight"].T).view(end, KV_HEADS, HEAD_DIM) for name in ("k", "v")
        )
        query = turned(rms(query, own["self_attn.q_norm.weight"]), torch.arange(start, end))
        key = turned(rms(key, own["self_attn.k_norm.weight"]), torch.arange(end))
        key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query, key) / HEAD_DIM**0.5
        scores = scores.masked_fill(~self._sees(layer, start), -torch.inf).softmax(-1)
        part = torch.einsum("hij,jhd->ihd", scores, value).flatten(1) @ own["self_attn.o_proj.weight"].T
        rows = rows + self.mixed(attention, 1, part, normed)
        normed = rms(rows, own["post_attention_layernorm.weight"])
        inputs = self.mixed(mlp, 0, normed, normed)
        gate, up = inputs @ own["mlp.gate_proj.weight"].T, inputs @ own["mlp.up_proj.weight"].T
        return rows + self.mixed(mlp, 1, (F.silu(gate) * up) @ own["mlp.down_proj.weight"].T, normed)

    def mixed(self, part: str, side: int, rows: Tensor, inputs: Tensor) -> Tensor:
        """What DFlash2 makes of rows before a part of a layer (``side`` 0) and behind it; DFlash does nothing."""
        return rows
