"""A target that says one token for ever, and heads that guess blocks of it: built, not trained, as those of clockwork.

Streams are as in ``clockwork``: each layer of the target turns a token's row. A head turns it back, so it shows which
layers it reads; rows of masks have it from the newest row of the text, by the rotary embedding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import clockwork
from clockwork import COLUMN, COLUMNS, LAYERS, ROW, SIZE, TAPPED, TURN, VOCAB, codes, turn

MASK, LEVELS, RANK = VOCAB - 1, 4, 16
_TEXT, _BLOCK = 20, 21  # numbers of a row that say what it is
_NEWEST = torch.tensor([1.0] * (SIZE // 2) + [0.0] * (SIZE // 2))  # as query and key: the nearer, the larger
_LAYERS = "layers.0."


def write_target(directory: Path) -> Path:
    return clockwork.write_target(directory, follow=lambda token_id: token_id)


def _reads(*numbers: int) -> Tensor:
    """[SIZE, SIZE]: a query or key where one of a row's numbers is not zero."""
    matrix = torch.zeros(SIZE, SIZE)
    matrix[:, list(numbers)] = _NEWEST[:, None]
    return matrix


def _mlp() -> dict[str, Tensor]:
    shapes = {"gate": (8, SIZE), "up": (8, SIZE), "down": (SIZE, 8)}
    return {f"{_LAYERS}mlp.{name}_proj.weight": torch.zeros(shape) for name, shape in shapes.items()}


def _norms(*names: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(SIZE) for name in names}


def peagle_weights() -> dict[str, Tensor]:
    """A row has its row from the feature and its column from the token; one of masks has both from the text."""
    embedding, nothing = codes() @ COLUMN, torch.zeros(SIZE, SIZE)
    embedding[:, _TEXT] = 1
    embedding[MASK] = torch.zeros(SIZE).index_fill(0, torch.tensor([_BLOCK]), 1.0)
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {
        "fc.weight": torch.cat([turn(-TURN * layer) for layer in TAPPED], dim=1),
        "mask_hidden": torch.zeros(1, 1, len(TAPPED) * SIZE),
        "embed_tokens.weight": embedding,
        "lm_head.weight": codes(),
        f"{_LAYERS}self_attn.q_proj.weight": torch.cat([6 * _reads(_TEXT, _BLOCK), nothing], dim=1),
        f"{_LAYERS}self_attn.k_proj.weight": torch.cat([6 * _reads(_TEXT), nothing], dim=1),
        f"{_LAYERS}self_attn.v_proj.weight": torch.cat([COLUMN, ROW], dim=1),
        f"{_LAYERS}self_attn.o_proj.weight": torch.eye(SIZE),
        **_norms("norm", *(_LAYERS + name for name in norms)),
        **_mlp(),
    }


def dspark_weights() -> dict[str, Tensor]:
    """A level has its row from the text before the anchor, and its column from the token above."""
    columns = torch.nn.functional.one_hot(torch.arange(VOCAB) % COLUMNS, RANK).float()
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    weights = {
        "fc.weight": torch.cat([turn(TURN * (LAYERS - layer)) for layer in TAPPED], dim=1),
        "embed_tokens.weight": torch.zeros(VOCAB, SIZE).index_fill(1, torch.tensor([_BLOCK]), 1.0),
        f"{_LAYERS}self_attn.q_proj.weight": _reads(_BLOCK),
        f"{_LAYERS}self_attn.k_proj.weight": _reads(*range(clockwork.ROWS)),
        f"{_LAYERS}self_attn.v_proj.weight": ROW,
        f"{_LAYERS}self_attn.o_proj.weight": torch.eye(SIZE),
        "markov_head.markov_w1.weight": 20 * columns,
        "markov_head.markov_w2.weight": columns.clone(),
        "confidence_head.proj.weight": torch.zeros(1, SIZE + RANK),
        "confidence_head.proj.bias": torch.ones(1),
        **_norms("norm", "hidden_norm", *(_LAYERS + name for name in norms)),
        **_mlp(),
    }
    for name in ("q_norm", "k_norm"):
        weights[f"{_LAYERS}self_attn.{name}.weight"] *= 7
    return weights


def write_head(directory: Path, kind: str, weights: dict[str, Tensor], **changes: object) -> Path:
    """``kind``: as speculators calls it. ``changes``: of its config."""
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
    told: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": TAPPED, "norm_before_residual": True}
    if kind == "dspark":
        told = {"aux_hidden_state_layer_ids": TAPPED, "block_size": LEVELS}
    sizes = {**clockwork.CONFIG, "model_type": "qwen3" if kind == "dspark" else "llama"}
    own = {"speculators_model_type": kind, "transformer_layer_config": sizes, "mask_token_id": MASK}
    (directory / "config.json").write_text(json.dumps({**own, **told, **changes}))
    return directory
