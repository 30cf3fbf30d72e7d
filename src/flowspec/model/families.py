"""The model families that can be cut into stages, a row each: all that depends on ``model_type`` is here.

Tensors have transformers' names, which are the same in all families; what files call otherwise is in ``ExpertNames``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowspec.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

PREFIX = "model."  # of all names but the lm_head's
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layer types

# Rotary embeddings whose frequencies do not depend on the length of the text, so that all segments agree on them.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Has other frequencies for texts longer than those of its first training. Texts end before that here.
SHORT_ROPE = "longrope"


@dataclass(frozen=True)
class ExpertNames:
    """What files call the parts of a layer's mixture of experts: each has its own matrices there."""

    block: str  # of the layer; transformers' modules have them in ``mlp``
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """Models of one ``model_type``."""

    model_type: str  # in config.json
    title: str  # for people
    layer_types: Callable[[PreTrainedConfig], list[str]]  # of the whole model, by the rule of the family's own code
    rope_types: tuple[str, ...] = STATIC_ROPE_TYPES
    embedding_scale: Callable[[PreTrainedConfig], float] = lambda config: 1.0  # by which its rows are multiplied
    logits_divisor: Callable[[PreTrainedConfig], float] = lambda config: 1.0
    norm_offset: float = 0.0  # of RMS norms: rows are multiplied by it and the weight together
    experts: ExpertNames | None = None  # of families in which a row runs through a few experts of many
    read_as: str | None = None  # a model_type with the same config and layers, where transformers does not know this

    def check(self, config: PreTrainedConfig, name: str) -> None:
        """Raise ``ModelError`` for a model, called ``name``, whose stages would not add up to it."""
        for rope in rope_tables(config):
            rope_type = rope.get("rope_type", "default")
            if rope_type not in self.rope_types:
                raise ModelError(
                    f"{name}: rotary scaling {rope_type!r} depends on the length of the text, so earlier keys would "
                    f"be wrong; supported are {', '.join(self.rope_types)}: change rope_parameters in config.json"
                )
        for trait in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if getattr(config, trait, None):
                raise ModelError(f"{name}: config.json sets {trait}, which no stage here computes; use another model")
        types, num_layers = self.layer_types(config), config.num_hidden_layers
        if not {FULL, SLIDING}.issuperset(types) or len(types) != num_layers:
            raise ModelError(
                f"{name}: layer_types in config.json must name {FULL} or {SLIDING} for each of the {num_layers} layers"
            )
        if SLIDING in types and not config.sliding_window:
            raise ModelError(f"{name}: config.json has sliding layers but no sliding_window; set it")
        if self.experts is not None and not 0 < config.num_experts_per_tok <= config.num_experts:
            raise ModelError(
                f"{name}: config.json sends a token to {config.num_experts_per_tok} of {config.num_experts} experts; "
                "download or mend the file"
            )


def rope_tables(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters: one table for all layers, or one for each type of layer."""
    rope: dict[str, Any] = config.rope_parameters
    return [rope[kind] for kind in (FULL, SLIDING) if kind in rope] or [rope]


def embedding_scale(config: PreTrainedConfig) -> float:
    """By which the embedding's rows are multiplied."""
    return float(FAMILIES[config.model_type].embedding_scale(config))


def logits_divisor(config: PreTrainedConfig) -> float:
    """By which the lm_head's products are divided."""
    return float(FAMILIES[config.model_type].logits_divisor(config))


def expert_names(config: PreTrainedConfig) -> ExpertNames | None:
    """``None`` where all rows run through all weights."""
    return FAMILIES[config.model_type].experts


def norm_scale(config: PreTrainedConfig, weight: Tensor) -> Tensor:
    """What an RMS norm with this weight [H] multiplies rows by."""
    return weight + FAMILIES[config.model_type].norm_offset


def layer_prefix(index: int) -> str:
    """How the names of one layer's tensors begin."""
    return f"{PREFIX}layers.{index}."


def family_of(model_type: object, where: str) -> Family:
    """Raises ``ModelError`` for a family that is not supported; ``where`` says who asks for it."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"{where}: model_type is {model_type!r}, which flowspec cannot cut into stages; "
            f"supported are {', '.join(row.title for row in FAMILIES.values())}"
        )
    return family


def _all_full(config: PreTrainedConfig) -> list[str]:
    return [FULL] * config.num_hidden_layers


def _all_alike(config: PreTrainedConfig) -> list[str]:
    return [FULL if config.sliding_window is None else SLIDING] * config.num_hidden_layers


def _as_listed(config: PreTrainedConfig) -> list[str]:
    return list(config.layer_types)


_ROWS = (
    Family("llama", "Llama", _all_full),
    Family("mistral", "Mistral", _all_alike),
    Family("qwen2", "Qwen2", _as_listed),
    Family("qwen3", "Qwen3", _as_listed),
    Family("qwen3_moe", "Qwen3-MoE", _all_alike, experts=ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")),
    Family("mixtral", "Mixtral", _all_alike, experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2")),
    Family("mimo", "MiMo", _as_listed, read_as="qwen2"),
    Family("smollm3", "SmolLM3", _as_listed),
    Family("phi3", "Phi-3/4", _all_alike, (*STATIC_ROPE_TYPES, SHORT_ROPE)),
    Family(
        "granite",
        "Granite",
        _all_full,
        embedding_scale=lambda config: config.embedding_multiplier,
        logits_divisor=lambda config: config.logits_scaling,
    ),
    Family(
        "gemma3_text",
        "Gemma3 (text)",
        _as_listed,
        embedding_scale=lambda config: config.hidden_size**0.5,
        norm_offset=1.0,
    ),
)
FAMILIES = {row.model_type: row for row in _ROWS}
