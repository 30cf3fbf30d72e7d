"""llama.cpp's architectures, a row each: which family they are, and what files call a layer's tensors.

As llama.cpp's converters write them (its ``conversion/`` and ``src/models/``). What their metadata say is read in
``gguf_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec.errors import ModelError
from flowspec.model.families import FAMILIES

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = _ATTENTION | {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_GEMMA = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Queries, keys and values are one matrix here, and so are gate and up, as in transformers.
_PHI = _ATTENTION | {
    "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _mixture(model_type: str) -> dict[str, str]:
    """A layer's names where one tensor holds a kind of matrix of all experts."""
    experts = FAMILIES[model_type].experts
    assert experts is not None, "a family of mixtures"
    kinds = {"ffn_gate_exps": experts.gate, "ffn_up_exps": experts.up, "ffn_down_exps": experts.down}
    names = {name: f"{experts.block}.experts.{kind}" for name, kind in kinds.items()}
    return _ATTENTION | {"ffn_gate_inp": f"{experts.block}.gate"} | names


@dataclass(frozen=True)
class Architecture:
    """Models of one ``general.architecture``."""

    name: str
    model_type: str  # the family's
    layer_names: Mapping[str, str]  # of a layer's tensors: transformers' by the file's
    interleaves_heads: bool = False  # the two halves of each head of queries and keys take turns, row by row
    turns_parts: bool = False  # rotary embeddings may turn a part of each head alone
    may_have_biases: bool = False  # transformers asks its config for them


_ROWS = (
    Architecture("llama", "llama", _LAYER, interleaves_heads=True, may_have_biases=True),
    Architecture("qwen2", "qwen2", _LAYER),
    Architecture("qwen3", "qwen3", _LAYER),
    Architecture("qwen3moe", "qwen3_moe", _mixture("qwen3_moe")),
    Architecture("gemma3", "gemma3_text", _GEMMA),
    Architecture("phi3", "phi3", _PHI, turns_parts=True),
    Architecture("granite", "granite", _LAYER, interleaves_heads=True, may_have_biases=True),
    Architecture("smollm3", "smollm3", _LAYER, interleaves_heads=True, may_have_biases=True),
)
ARCHITECTURES = {row.name: row for row in _ROWS}
_MIXTRAL = Architecture("llama", "mixtral", _mixture("mixtral"), interleaves_heads=True)


def architecture_of(values: Mapping[str, Any], path: Path) -> Architecture:
    """By a file's metadata. Raises ``ModelError`` for one that is not read."""
    name = values.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{path}: its architecture is {name!r}, which flowspec cannot read from GGUF; supported "
            f"are {', '.join(ARCHITECTURES)}"
        )
    return _MIXTRAL if name == "llama" and values.get("llama.expert_count") else ARCHITECTURES[name]
