"""transformers' config of what a GGUF file's metadata say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedConfig

from flowspec.errors import ModelError, first_line
from flowspec.model.config_file import check_config
from flowspec.model.families import EMBEDDING, FULL, LM_HEAD, SHORT_ROPE, SLIDING
from flowspec.model.gguf_architectures import Architecture
from flowspec.model.gguf_header import TensorPlace

# What Gemma 3's files leave to who reads them: one of six layers sees all, the others turn keys by a base of their own.
_GEMMA_PATTERN, _GEMMA_LOCAL_BASE, _GEMMA_27B_LAYERS = 6, 10000.0, 62
_ROPE_FACTORS = "rope_freqs.weight"  # of the rotary frequencies: what config.json says as rope_type llama3
_SHORT_FACTORS, _LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"  # the same, as longrope
CONFIG_TENSORS = frozenset({_ROPE_FACTORS, _SHORT_FACTORS, _LONG_FACTORS})  # that a config is made of


class ConfigReader:
    """Of one file. Every failure is a ``ModelError`` that names it, and the way out."""

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        values: Mapping[str, Any],
        places: Mapping[str, TensorPlace],
        floats: Callable[[str], NDArray[np.float32]],
    ) -> None:
        """``values``: the metadata; ``places``: of the tensors, by transformers' names; ``floats``: reads one."""
        self._path = path
        self._architecture = architecture
        self._values = values
        self._places = places
        self._floats = floats

    def read(self) -> PreTrainedConfig:
        num_heads, hidden_size = self._count("attention.head_count"), self._count("embedding_length")
        if EMBEDDING not in self._places:
            raise ModelError(f"{self._path} holds no tensor for {EMBEDDING}; download or convert the model again")
        fields: dict[str, Any] = {
            "vocab_size": self._places[EMBEDDING].shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._count("attention.head_count_kv", num_heads),
            "head_dim": self._count("attention.key_length", hidden_size // num_heads),
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon", 1e-6),
            "tie_word_embeddings": LM_HEAD not in self._places,
            "bos_token_id": self._values.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._end_ids() or None,
            "pad_token_id": None,  # some families have one by default, whatever the vocabulary
        }
        fields["rope_parameters"] = self._rope_parameters(fields["head_dim"])
        if self._architecture.may_have_biases:
            fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._places
            fields["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self._places
        own = {
            "gemma3_text": self._gemma_fields,
            "granite": self._granite_fields,
            "phi3": self._phi_fields,
            "qwen3_moe": self._qwen_moe_fields,
            "mixtral": self._mixtral_fields,
        }.get(self._architecture.model_type)
        try:
            config = AutoConfig.for_model(self._architecture.model_type, **fields | (own(fields) if own else {}))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{self._path}: its metadata make no config ({first_line(error)})") from error
        check_config(config.to_dict(), str(self._path))
        return config

    # --- what the architectures add ---

    def _gemma_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        num_layers, per_head = fields["num_hidden_layers"], fields["hidden_size"] // fields["num_attention_heads"]
        pattern = self._count("attention.sliding_window_pattern", _GEMMA_PATTERN)
        local = {"rope_type": "default", "rope_theta": self._float("rope.freq_base_swa", _GEMMA_LOCAL_BASE)}
        return {
            "layer_types": [SLIDING if (index + 1) % pattern else FULL for index in range(num_layers)],
            "sliding_window": self._count("attention.sliding_window"),
            "query_pre_attn_scalar": per_head if num_layers == _GEMMA_27B_LAYERS else fields["head_dim"],
            "rope_parameters": {FULL: fields["rope_parameters"], SLIDING: local},
        }

    def _granite_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        if self._value("rope.scaling.finetuned", True) is False:
            raise ModelError(f"{self._path}: a Granite model without rotary embeddings, which transformers has not")
        return {
            "embedding_multiplier": self._float("embedding_scale", 1.0),
            "attention_multiplier": self._float("attention.scale", fields["head_dim"] ** -0.5),
            "residual_multiplier": self._float("residual_scale", 1.0),
            "logits_scaling": self._float("logit_scale", 1.0),
        }

    def _phi_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """With the window that the model was trained with; llama.cpp leaves it out."""
        original = self._count("rope.scaling.original_context_length", fields["max_position_embeddings"])
        window = self._value("attention.sliding_window")
        return {"original_max_position_embeddings": original, "sliding_window": window or None}

    def _qwen_moe_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """llama.cpp knows no dense layers among the others, and always makes a row's weights add up to 1."""
        used = self._count("expert_used_count")
        return {
            "num_experts": self._count("expert_count"),
            "num_experts_per_tok": used,
            "moe_intermediate_size": self._count("expert_feed_forward_length", fields["intermediate_size"] // used),
            "norm_topk_prob": True,
        }

    def _mixtral_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "num_local_experts": self._count("expert_count"),
            "num_experts_per_tok": self._count("expert_used_count"),
        }

    # --- rotary embeddings ---

    def _rope_parameters(self, head_dim: int) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "rope_type": self._value("rope.scaling.type", "none"),
            "rope_theta": self._float("rope.freq_base", 10000.0),
        }
        turned = self._count("rope.dimension_count", head_dim)
        if self._architecture.turns_parts:
            parameters["partial_rotary_factor"] = turned / head_dim
        elif turned != head_dim:
            raise ModelError(
                f"{self._path}: rotary embeddings turn {turned} of the {head_dim} numbers of a head, which flowspec "
                f"cannot read of the architecture {self._architecture.name!r}; use the model's directory"
            )
        if _SHORT_FACTORS in self._places:
            return parameters | self._long_parameters()
        if parameters["rope_type"] != "none":
            parameters["factor"] = self._float("rope.scaling.factor", 1.0)
            if original := self._value("rope.scaling.original_context_length"):
                parameters["original_max_position_embeddings"] = original
        elif _ROPE_FACTORS in self._places:
            parameters |= self._llama3_parameters()
        else:
            parameters["rope_type"] = "default"
        return parameters

    def _long_parameters(self) -> dict[str, Any]:
        """Of Phi's longrope. Rows are multiplied by a factor that the file says, or that follows from its lengths."""
        short, long = (self._floats(name).reshape(-1).tolist() for name in (_SHORT_FACTORS, _LONG_FACTORS))
        factor = self._value("rope.scaling.attn_factor")
        return {
            "rope_type": SHORT_ROPE,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": self._count("rope.scaling.original_context_length"),
        } | ({} if factor is None else {"attention_factor": self._float("rope.scaling.attn_factor", 1.0)})

    def _llama3_parameters(self) -> dict[str, Any]:
        """The factors say the largest; the rest is the same in all models of Llama 3.1 to 3.3, and is checked."""
        factors = self._floats(_ROPE_FACTORS).reshape(-1)
        factor, original = float(factors.max()), 8192
        theta, dim = self._float("rope.freq_base", 10000.0), 2 * len(factors)
        wavelengths = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
        share = np.clip((original / wavelengths - 1) / (4 - 1), 0, 1)
        if not np.allclose(1 / factors, (1 - share) / factor + share, rtol=1e-3):
            raise ModelError(f"{self._path}: {_ROPE_FACTORS} is no scaling of Llama 3; use the model's directory")
        names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return dict(zip(names, ("llama3", factor, 1.0, 4.0, original), strict=True))

    # --- single values ---

    def _end_ids(self) -> list[int]:
        names = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = {self._values.get(f"tokenizer.ggml.{name}") for name in names}
        return sorted(token_id for token_id in found if isinstance(token_id, int))

    def _value(self, name: str, default: Any = None) -> Any:
        """Of the model's own architecture."""
        return self._values.get(f"{self._architecture.name}.{name}", default)

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._odd(name, value)
        return value

    def _float(self, name: str, default: float) -> float:
        value = self._value(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self._odd(name, value)
        return float(value)

    def _odd(self, name: str, value: object) -> ModelError:
        return ModelError(f"{self._path}: its metadata says {value!r} as {name}; convert the model again")
