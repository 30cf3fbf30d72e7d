"""The EAGLE-3 draft head: its layers, and its logits. Knows nothing of trees, slots and files' dialects.

Its first matrix ``fc`` is not here but for its bias: the target's stages multiply by its blocks, and add up
(``model.taps``). So a feature comes here as that sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from flowspec.core import DType
from flowspec.model.draft_head import DraftHead
from flowspec.model.eagle3_format import FC_BIAS, INPUT_NORM, MASK_HIDDEN, Eagle3Format
from flowspec.model.head_tensors import EMBEDDING, FC, HEAD, IDS
from flowspec.model.target_head import LogitsHead

# Tensors of a checkpoint that are no part of the module.
_NOT_HERE = {FC, FC_BIAS, INPUT_NORM, EMBEDDING, HEAD, IDS, MASK_HIDDEN}


class FirstLayer(nn.Module):
    """A decoder layer whose attention reads the embedding beside the feature, each behind a norm of its own.

    The residual stream is the feature's.
    """

    def __init__(self, config: LlamaConfig | Qwen3Config, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        layer: Any = _decoder_layer(config, 0)
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            own = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * own.in_features, own.out_features, own.bias is not None))
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embedded: Tensor, features: Tensor, use_cache: bool, **attention: Any) -> Tensor:
        """Both [B, T, D] -> [B, T, D]; ``use_cache`` and ``attention`` as a decoder layer takes them."""
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        rows, _ = self.self_attn(hidden_states=torch.cat((self.input_layernorm(embedded), normed), dim=-1), **attention)
        residual = residual + rows
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3Head(DraftHead):
    """EAGLE-3 draft head: token and feature in, the state out that is the next row's feature.

    The row of token ``x[p]`` is fed with what the target's layers make of ``x[p-1]``, or, where that is not known yet,
    with its own output for that token. Its logits are those of ``x[p+1]``. Rotary positions are ``p - 1``, as with
    ``EagleHead``; only their differences matter.
    """

    fc_bias: Tensor | None  # [D]

    def __init__(
        self,
        config: LlamaConfig | Qwen3Config,
        embedding: Tensor,
        *,
        biases: frozenset[str] = frozenset(),
        norm_before_residual: bool = False,
        norm_output: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        """``biases``: the names of the linear layers that have one. ``norm_eps``: of the norm of all streams, if any.

        ``norm_output``: rows are fed with what has passed the last norm.
        """
        super().__init__(config, embedding)
        self.norm_output = norm_output
        self.norm_eps = norm_eps
        self.register_buffer("fc_bias", None, persistent=False)
        more = [_decoder_layer(config, index) for index in range(1, config.num_hidden_layers)]
        self.layers = nn.ModuleList([FirstLayer(config, norm_before_residual), *more])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._set_biases(biases)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]

    def _join(self, embedded: Tensor, features: Tensor) -> Tensor:
        """They meet within the first layer."""
        return features

    def _run_layers(self, embedded: Tensor, rows: Tensor, attention: dict[str, Any]) -> Tensor:
        first, *more = self.layers
        rows = first(embedded, rows, **attention)
        for layer in more:
            rows = layer(rows, **attention)
        return self.norm(rows) if self.norm_output else rows

    def features_of(self, read: Tensor) -> Tensor:
        """What the stages have added up [n, width] -> features [n, D]."""
        sums = read.to(self.embedding.device)
        if self.norm_eps is not None:
            scales = torch.rsqrt(sums[:, -1:].float() + self.norm_eps)
            sums = (sums[:, :-1].float() * scales).to(sums.dtype)
        sums = sums.to(self.embedding.dtype)
        return sums if self.fc_bias is None else sums + self.fc_bias

    @classmethod
    def load(cls, form: Eagle3Format, embedding: Tensor, dtype: DType, device: torch.device | str) -> Eagle3Head:
        """``embedding`` [V, H]: the target's, where the file has none. Raises ``ModelError``."""
        torch_dtype: torch.dtype = getattr(torch, dtype)
        if EMBEDDING in form.names:
            embedding = form.tensor(EMBEDDING)
        biases = frozenset(name.removesuffix(".bias") for name in form.names if name.endswith(".bias"))
        with torch.device("meta"):
            head = cls(
                form.config,
                embedding.to(device, torch_dtype),
                biases=biases,
                norm_before_residual=form.norm_before_residual,
                norm_output=form.norm_output,
                norm_eps=form.config.rms_norm_eps if form.has_input_norm else None,
            )
        head.rotary_emb = LlamaRotaryEmbedding(form.config).to(device)  # type: ignore[arg-type]
        if FC_BIAS in form.names:
            head.fc_bias = form.tensor(FC_BIAS).to(device, torch_dtype)
        known = _NOT_HERE | {f"fc_norm.{place}.weight" for place in range(len(form.layer_ids))}
        form.fill(head, known, torch_dtype, device)
        return head.eval().requires_grad_(False)


class NormedHead:
    """Logits of a head's states: its last norm, if that is not behind them yet, then its lm_head."""

    def __init__(self, head: Eagle3Head, lm_head: LogitsHead) -> None:
        """``lm_head``: the file's own, or the target's; of all tokens of the target's vocabulary."""
        self._head = head
        self._lm_head = lm_head

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V]; minus infinity for tokens that the draft does not know."""
        return self._lm_head.logits(hidden if self._head.norm_output else self._head.norm(hidden))


def _decoder_layer(config: LlamaConfig | Qwen3Config, index: int) -> nn.Module:
    return Qwen3DecoderLayer(config, index) if isinstance(config, Qwen3Config) else LlamaDecoderLayer(config, index)
