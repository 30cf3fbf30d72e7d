"""A target and an EAGLE-3 head that are built and not trained, and of which every part shows when it is wrong.

A token stands in a row and a column of a table, and its successor in the next row: the text goes round through all
tokens. Streams are two ones, for a row and a column. Every layer of the target attends to its own position alone and
turns the row by three, so each stream tells its layer. The head takes the successor's row from the feature, which it
turns by one at each step, and its column from the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tiny_models import make_tokenizer_files

ROWS, COLUMNS, SIZE, LAYERS, TAPPED = 8, 12, 32, 6, (1, 3, 5)
VOCAB = ROWS * COLUMNS
EPS = 1e-6
TURN = 3  # rows by which a layer turns a stream
FOCUS = 6.0  # of attention on its own position

CONFIG = {
    "hidden_size": SIZE,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": SIZE,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": EPS,
}


def successor(token_id: int) -> int:
    row, column = divmod(token_id, COLUMNS)
    return (row + 1) % ROWS * COLUMNS + (column + (4 if row == ROWS - 1 else 1)) % COLUMNS


def _code(row: int, column: int) -> Tensor:
    """As long as norms make it."""
    code = torch.zeros(SIZE)
    code[row % ROWS] = code[ROWS + column] = (SIZE / 2) ** 0.5
    return code


def codes(shift: int = 0, follow: bool = False) -> Tensor:
    """[V, SIZE]: of each token, or of its successor, with its row turned."""
    ids = [successor(token_id) if follow else token_id for token_id in range(VOCAB)]
    return torch.stack([_code(token_id // COLUMNS + shift, token_id % COLUMNS) for token_id in ids])


def turn(shift: int) -> Tensor:
    """[SIZE, SIZE]: turns a code's row, and drops its column."""
    matrix = torch.zeros(SIZE, SIZE)
    for row in range(ROWS):
        matrix[(row + shift) % ROWS, row] = 1
    return matrix


ROW, COLUMN = turn(0), torch.diag(torch.tensor([0.0] * ROWS + [1.0] * COLUMNS + [0.0] * (SIZE - ROWS - COLUMNS)))


def write_target(directory: Path, follow: Callable[[int], int] = successor) -> Path:
    """``follow``: of a token the one behind it."""
    config = LlamaConfig(
        **CONFIG, num_hidden_layers=LAYERS, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(codes())
        last = codes(shift=TURN * LAYERS)
        for token_id in range(VOCAB):
            model.lm_head.weight[follow(token_id)] = last[token_id]
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.copy_(FOCUS * torch.eye(SIZE))
            layer.self_attn.k_proj.weight.copy_(torch.eye(SIZE))
            layer.self_attn.v_proj.weight.copy_(turn(TURN) - ROW)
            layer.self_attn.o_proj.weight.copy_(torch.eye(SIZE))
            layer.mlp.down_proj.weight.zero_()
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    make_tokenizer_files(directory, VOCAB)
    return directory


def head_weights() -> dict[str, Tensor]:
    """By the names that EAGLE's own files have."""
    ones, zeros = torch.ones(SIZE), torch.zeros(SIZE, SIZE)
    blocks = [(turn(1 - TURN * layer) + COLUMN) * 3 for layer in TAPPED]  # no norm has been there before
    from_feature = turn(1) - ROW - COLUMN  # what is left is the row, turned
    return {
        "fc.weight": torch.cat(blocks, dim=1),
        "embed_tokens.weight": codes(follow=True),
        "lm_head.weight": codes(),
        "norm.weight": ones,
        "midlayer.input_layernorm.weight": ones.clone(),
        "midlayer.hidden_norm.weight": ones.clone(),
        "midlayer.post_attention_layernorm.weight": ones.clone(),
        "midlayer.self_attn.q_proj.weight": torch.cat([FOCUS * torch.eye(SIZE), zeros], dim=1),
        "midlayer.self_attn.k_proj.weight": torch.cat([torch.eye(SIZE), zeros], dim=1),
        "midlayer.self_attn.v_proj.weight": torch.cat([COLUMN, from_feature], dim=1),
        "midlayer.self_attn.o_proj.weight": torch.eye(SIZE),
        "midlayer.mlp.gate_proj.weight": torch.zeros(8, SIZE),
        "midlayer.mlp.up_proj.weight": torch.zeros(8, SIZE),
        "midlayer.mlp.down_proj.weight": torch.zeros(SIZE, 8),
    }


def write_head(directory: Path, weights: dict[str, Tensor], **changes: object) -> Path:
    """``changes``: of its config."""
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
    inner = {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in TAPPED]}
    config = {"model_type": "llama", "norm_before_residual": True, "eagle_config": inner, **CONFIG, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
