"""A target of MiMo's and its MTP layer that are built and not trained, and of which every part shows when it is wrong.

As in ``clockwork``, but a token's successor is one row and one column further, and beside its row and column a token
has a decoy, a strong one of another column, which the norms' weights leave out. The layer takes the successor's row
from the hidden state and its column from the embedding; its first matrix would take in decoys, too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from clockwork import COLUMN, COLUMNS, CONFIG, FOCUS, LAYERS, ROW, ROWS, SIZE, TURN, VOCAB, codes, turn
from tiny_mtp import write_as_mimo, write_characters, write_mtp

_CODE = ROWS + COLUMNS  # channels of rows and columns; as many decoys as columns are behind them
_DECOY = 12.0
_LENGTH = (1 + _DECOY**2 / SIZE) ** 0.5  # by which norms shorten a code that has a decoy
_DECOYS = torch.zeros(SIZE, SIZE)  # makes columns of them
_DECOYS[range(ROWS, _CODE), range(_CODE, SIZE)] = 1.0


def successor(token_id: int) -> int:
    row, column = divmod(token_id, COLUMNS)
    return (row + 1) % ROWS * COLUMNS + (column + 1) % COLUMNS


def _norm() -> Tensor:
    """Of what is normed the code as it was, and no decoy."""
    return torch.tensor([_LENGTH] * _CODE + [0.0] * COLUMNS)


def write_target(directory: Path) -> Path:
    """With the layer of ``mtp_weights``."""
    config = Qwen2Config(
        **CONFIG, num_hidden_layers=LAYERS, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(codes())
        for token_id in range(VOCAB):
            model.model.embed_tokens.weight[token_id, _CODE + (token_id + 5) % COLUMNS] = _DECOY
            model.lm_head.weight[successor(token_id)] = codes(shift=TURN * LAYERS)[token_id]
        for layer in model.model.layers:
            layer.input_layernorm.weight.copy_(_norm())
            layer.self_attn.q_proj.weight.copy_(FOCUS * torch.eye(SIZE))
            layer.self_attn.k_proj.weight.copy_(torch.eye(SIZE))
            layer.self_attn.v_proj.weight.copy_(turn(TURN) - ROW)
            layer.self_attn.o_proj.weight.copy_(torch.eye(SIZE))
            for name in "qkv":
                getattr(layer.self_attn, f"{name}_proj").bias.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.copy_(torch.linspace(1, 2, SIZE))  # which the layer must not mistake for its own
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    write_as_mimo(directory)
    write_characters(directory)
    return write_layer(directory, mtp_weights())


def write_layer(directory: Path, weights: dict[str, Tensor]) -> Path:
    """Into a model's files."""
    write_mtp(directory, changes={f"0.{name}": tensor for name, tensor in weights.items()})
    return directory


def mtp_weights() -> dict[str, Tensor]:
    """By the files' names, behind the layer's number."""
    weights = {f"{name}_layernorm.weight": torch.ones(SIZE) for name in ("input", "post_attention", "final")}
    weights |= {f"{name}_layernorm.weight": _norm() for name in ("token", "hidden")}
    weights["input_proj.weight"] = first_matrix(turn(1), COLUMN)
    weights["self_attn.o_proj.weight"] = torch.zeros(SIZE, SIZE)
    weights["mlp.down_proj.weight"] = torch.zeros(SIZE, CONFIG["intermediate_size"])
    return weights


def first_matrix(of_hidden: Tensor, of_embedding: Tensor) -> Tensor:
    """[SIZE, 2 SIZE]."""
    return torch.cat([of_hidden + _DECOYS, of_embedding + _DECOYS], dim=1)
