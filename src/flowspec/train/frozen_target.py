"""The model that a head is trained for: what it makes of text, and what the head shares with it. Nothing is learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flowspec.errors import ModelError, UsageError
from flowspec.model.backends import open_checkpoint
from flowspec.model.demo_pair import DEMO, demo_directory
from flowspec.model.families import LM_HEAD, logits_divisor, norm_scale, rope_tables
from flowspec.model.gguf_checkpoint import GGUFCheckpoint
from flowspec.model.loader import Checkpoint
from flowspec.model.stage_weights import EXPERTS


class Target:
    """The frozen target in bfloat16: its features, its distribution, its embedding."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        self.model: Any = model.to(torch.bfloat16).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue, reportArgumentType]
        self.config: Any = model.config
        self.device = model.device
        self.embedding = embedding_of(model).float()
        self.lm_head: Tensor = self.model.get_output_embeddings().weight.detach()
        if (divisor := logits_divisor(self.config)) != 1.0:
            self.lm_head = self.lm_head / divisor
        self.final_norm = norm_scale(
            self.model.config, self.model.base_model.norm.weight.detach()
        )  # as rows are scaled
        self._run: Callable[[Tensor], Tensor] = torch.compile(self._features) if compiled else self._features

    @classmethod
    def open(cls, name: str | Path, *, compiled: bool = False) -> Target:
        """Read a checkpoint of a supported family, onto the GPU where there is one; raises ``ModelError``."""
        model = load_model(name, torch.bfloat16)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), compiled=compiled)  # pyright: ignore[reportArgumentType]

    @cached_property
    def digest(self) -> str:
        """Tells one target's weights from another's."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().float().sum(dtype=torch.float64).cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def features(self, token_ids: Tensor) -> Tensor:
        """float32 [B, T, H], after the final norm, of tokens [B, T]."""
        return self._run(token_ids).float()

    @torch.no_grad()
    def hidden_states(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, T, H] after 1, 2, ... layers, of tokens [B, T]; the last are the features."""
        output = self.model.base_model(input_ids=token_ids, use_cache=False, output_hidden_states=True)
        return tuple(states.float() for states in output.hidden_states[1:])

    def tapped_streams(self, token_ids: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What enters the layers, float32 [B, T, n H], and the features [B, T, H], of tokens [B, T]."""
        states = self.hidden_states(token_ids)
        return torch.cat([states[layer - 1] for layer in layers], dim=-1), states[-1]

    def logits(self, features: Tensor) -> Tensor:
        """float32 [..., V]."""
        return F.linear(features.to(self.lm_head.dtype), self.lm_head).float()

    def _features(self, token_ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state


def load_model(name: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The target as transformers runs it; ``name``: as of ``open_checkpoint``. Raises ``ModelError``."""
    checkpoint = open_checkpoint(name)
    if isinstance(checkpoint, GGUFCheckpoint) or checkpoint.layout is not None:
        return _dequantised(checkpoint, dtype)
    directory = demo_directory() if str(name) == DEMO else Path(name).expanduser()
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory if directory.is_dir() else str(name),
            config=checkpoint.config,
            dtype=dtype,
            experts_implementation=EXPERTS,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        message = str(error).splitlines()[0]
        raise ModelError(f"{checkpoint.name} cannot be loaded ({message}); fetch its files again") from None


def _dequantised(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype, experts_implementation=EXPERTS)
    places = model.state_dict()
    shapes = {name: tuple(place.shape) for name, place in places.items()}
    if LM_HEAD not in checkpoint.tensor_names():
        del shapes[LM_HEAD]
    with torch.no_grad():
        for name, tensor in checkpoint.module_tensors(shapes, "float32", "cpu"):
            places[name].copy_(tensor)
    model.tie_weights()
    return model


def embedding_of(model: Any) -> Tensor:
    """The model's token embedding [V, H], which its head shares."""
    return model.get_input_embeddings().weight.detach()


def head_config(target: Any) -> LlamaConfig:
    """One Llama layer of the sizes in the target's config, whatever its family."""
    return LlamaConfig.from_dict(
        {
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": target.num_attention_heads,
            "num_key_value_heads": target.num_key_value_heads,
            "head_dim": getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
            "hidden_act": getattr(target, "hidden_act", "silu"),
            "rms_norm_eps": target.rms_norm_eps,
            "rope_parameters": rope_tables(target)[0],
            "max_position_embeddings": target.max_position_embeddings,
            "bos_token_id": target.bos_token_id,
            "eos_token_id": target.eos_token_id,
            "pad_token_id": target.pad_token_id,
        }
    )


def spread_layers(num_target_layers: int, num_taps: int) -> list[int]:
    """So many layers that a head reads, or all of a smaller target; k stands for the stream that enters layer k.

    They are spread from near the first layer to near the last. Raises ``UsageError`` for a target of one layer, before
    and behind which is nothing to read.
    """
    if num_target_layers < 2:
        raise UsageError("the target has a single layer, and such a head reads what goes from layer to layer")
    first, last = 2, num_target_layers - 3
    if last - first < num_taps - 1:
        first, last = 1, num_target_layers - 1
    step = (last - first) / max(1, num_taps - 1)
    return sorted({round(first + place * step) for place in range(num_taps)})
