"""What a config.json may say: sizes that models have, of the right types, before anybody makes lists of that length.

transformers takes most values as they are, and meets an odd one somewhere inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowspec.errors import ModelError, shortened

_MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "max_position_embeddings": 2**31,
}
_MOST_OPTIONAL = {
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "sliding_window": 2**31,
    "original_max_position_embeddings": 2**31,
    "num_experts": 2**12,
    "num_local_experts": 2**12,
    "num_experts_per_tok": 2**12,
    "moe_intermediate_size": 2**22,
    "decoder_sparse_step": 2**12,
}
_COUNTS_FROM_0 = {"max_window_layers": 2**12, "num_nextn_predict_layers": 2**6}
_POSITIVE = (
    "rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling",
)  # fmt: skip
_SHARES = ("partial_rotary_factor",)
_SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "bias",
    "qkv_bias",
    "norm_topk_prob",
)
_TEXTS = ("hidden_act", "rope_type", "type", "torch_dtype", "dtype")
_TABLES = ("rope_scaling", "rope_parameters")


def check_config(content: Mapping[str, Any], where: str) -> None:
    """``where``: the file. Raises ``ModelError`` that names the field."""
    for name, value in content.items():
        if value is None and name not in _MOST:
            continue
        if (wanted := _wanted(name, value)) is not None:
            _refuse(where, name, value, wanted)
        if name in _TABLES and isinstance(value, dict):
            check_config(value, f"{where}: {name}")
    _check_heads(content, where)
    rates = content.get("hit_rates")  # of a draft head of ours
    is_rates = isinstance(rates, list) and all(isinstance(rate, float | int) and 0 <= rate <= 1 for rate in rates)
    if rates is not None and not is_rates:
        _refuse(where, "hit_rates", rates, "a list of numbers in 0..1")
    types = content.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
        _refuse(where, "layer_types", types, "a list of names")
    dense = content.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(_is_count(index, 0, 2**12) for index in dense)):
        _refuse(where, "mlp_only_layers", dense, "a list of layers' numbers")


def _wanted(name: str, value: Any) -> str | None:
    """What the value should have been; ``None``: it is that, or nobody minds."""
    if (most := _MOST.get(name) or _MOST_OPTIONAL.get(name)) is not None:
        return None if _is_count(value, 1, most) else f"a whole number in 1..{most}"
    if (most := _COUNTS_FROM_0.get(name)) is not None:
        return None if _is_count(value, 0, most) else f"a whole number in 0..{most}"
    if name in _POSITIVE:
        return None if _is_number(value) and 0 < value < math.inf else "a positive number"
    if name in _SHARES:
        return None if _is_number(value) and 0 < value <= 1 else "a number above 0, and at most 1"
    if name in _SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if name in _TEXTS:
        return None if isinstance(value, str) else "a text"
    if name in _TABLES:
        return None if isinstance(value, dict) else "an object"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check_heads(content: Mapping[str, Any], where: str) -> None:
    num_heads, num_kv_heads = content.get("num_attention_heads"), content.get("num_key_value_heads")
    if num_heads and num_kv_heads and num_heads % num_kv_heads:
        _refuse(where, "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    hidden_size, head_dim = content.get("hidden_size"), content.get("head_dim")
    if num_heads and hidden_size and not head_dim and hidden_size % num_heads:
        _refuse(where, "hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}")
    if head_dim and head_dim % 2:
        _refuse(where, "head_dim", head_dim, "even: rotary embeddings turn pairs")


def _refuse(where: str, name: str, value: Any, wanted: str) -> None:
    raise ModelError(f"{where}: {name} is {shortened(repr(value), 60)}; it must be {wanted}: download or mend the file")
