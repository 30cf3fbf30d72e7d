"""MTP layers: what a model brings along to guess the token behind its next one (multi-token prediction). MiMo-7B's.

``model.mtp_layers.i.*`` beside the model's own layers, ``num_nextn_predict_layers`` of them: ``token_layernorm`` and
``hidden_layernorm`` [H], ``input_proj`` [H, 2 H], a Qwen2 decoder layer, ``final_layernorm`` [H]; embedding and lm_head
are the model's. As in vLLM's ``mimo_mtp.py``, which is by the model's authors:

* ``input_proj([hidden_layernorm(h[t]); token_layernorm(embedding(x[t+1]))])``, the hidden state first;
* ``h`` is what leaves the model's layers, before its final norm;
* at rotary position 0 the embedding is 0;
* at further depths a layer reads what it has put out itself, behind ``final_layernorm``, and the first layer alone does
  so, however many there are.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from flowspec.core import DType
from flowspec.errors import ModelError, first_line
from flowspec.model.draft_head import DraftHead
from flowspec.model.families import FULL, PREFIX, norm_scale
from flowspec.model.loader import Checkpoint
from flowspec.model.source import TensorSource

_LAYER = re.compile(re.escape(PREFIX) + r"mtp_layers\.(\d+)\.")
_FIRST = f"{PREFIX}mtp_layers.0."
_BLOCK = "layers.0."  # of the module, whose names the files do not have


class LostMtpError(ModelError):
    """A config speaks of MTP layers that are in no file."""


@dataclass(frozen=True)
class MtpLayers:
    """A checkpoint's MTP layers, of which names and shapes have been looked through."""

    source: Checkpoint  # the target, or another copy of it

    @classmethod
    def read(cls, source: Checkpoint) -> MtpLayers:
        """Of a model that ``has_mtp``. Raises ``LostMtpError``, and ``ModelError`` for what does not fit its config."""
        num = _num_layers(source)
        found = {int(match[1]) for match in map(_LAYER.match, source.tensor_names()) if match}
        told = f"{source.name}: config.json says {num} MTP layer{'s' * (num > 1)} (num_nextn_predict_layers)"
        if not found:
            raise LostMtpError(
                f"{told}, but its files hold none, as those of many quantised copies; with --draft the original's "
                "directory gives its own"
            )
        if found != set(range(num)):
            raise ModelError(
                f"{told}, but its files hold those numbered {', '.join(map(str, sorted(found)))}; files and config do "
                "not belong together: download the model again, or choose another draft"
            )
        layers = cls(source)
        layers._check()
        return layers

    def files(self) -> list[Path]:
        """That lie on this device."""
        return self.source.files()

    def bare_head(self, embedding: Tensor) -> MtpHead:
        """Of the layer that is used, without values. Raises ``ModelError``."""
        config = copy.deepcopy(self.source.config)
        config.num_hidden_layers, config.layer_types = 1, [FULL]
        try:
            with torch.device("meta"):
                return MtpHead(config, embedding)
        except Exception as error:  # whatever transformers meets in what somebody has written
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ModelError(
                f"{self.source.name}: no MTP layer can be made by config.json ({reason}); download or mend the file"
            ) from error

    def _check(self) -> None:
        """Raises ``ModelError`` for tensors that are missing, unknown, or of other shapes."""
        source = self.source
        head = self.bare_head(torch.empty(0, source.hidden_size))
        wanted = {_stored_name(name): tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        stored = {name for name in source.tensor_names() if name.startswith(_FIRST)}
        for problem, names in (("lack", wanted.keys() - stored), ("have unknown tensors", stored - wanted.keys())):
            if names:
                raise ModelError(
                    f"{source.name}: the files of its MTP layer {problem} {', '.join(sorted(names)[:4])}; download the "
                    "model again, or choose another draft"
                )
        for name, shape in wanted.items():
            own = source.stored(name) if source.parts_of(name) == (name,) else None
            if own is not None and own.shape != shape:
                raise ModelError(
                    f"{source.name}: {source.shard_of(name)} holds {name} with shape {own.shape}, but config.json asks "
                    f"for {shape}; download the model again, or choose another draft"
                )


def has_mtp(source: TensorSource) -> bool:
    """Whether a model's config speaks of MTP layers of the kind that is known here."""
    return isinstance(source.config, Qwen2Config) and _num_layers(source) > 0


def _num_layers(source: TensorSource) -> int:
    return getattr(source.config, "num_nextn_predict_layers", None) or 0


def _stored_name(name: str) -> str:
    """A module's tensor -> what files call it."""
    return _FIRST + name.removeprefix(_BLOCK)


class MtpHead(DraftHead):
    """A feature is a hidden state behind ``hidden_layernorm``; the head gives what its lm_head reads.

    The row of token ``x[p]`` is fed with the hidden state of ``x[p-1]``, has rotary position ``p - 1``, and its logits
    are those of ``x[p+1]``: as with ``EagleHead``.
    """

    scale: Tensor  # [H]: by which what comes of the target's final norm is multiplied

    def __init__(self, config: Any, embedding: Tensor) -> None:
        """``embedding`` [V, H] is the target's."""
        super().__init__(config, embedding)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = Qwen2RMSNorm(size, eps)
        self.hidden_layernorm = Qwen2RMSNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([Qwen2DecoderLayer(config, 0)])
        self.final_layernorm = Qwen2RMSNorm(size, eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)
        self.register_buffer("scale", torch.ones(size), persistent=False)

    def features_of(self, read: Tensor) -> Tensor:
        """The target's norm and this one differ in nothing but their weights, so that one makes the other."""
        return (read.to(self.scale.device).float() * self.scale).to(self.embedding.dtype)

    def fed_back(self, states: Tensor) -> Tensor:
        return self.hidden_layernorm(states)

    def _embed(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super()._embed(token_ids, position_ids).masked_fill((position_ids == 0)[..., None], 0.0)

    def _join(self, embedded: Tensor, features: Tensor) -> Tensor:
        return self.input_proj(torch.cat((features, self.token_layernorm(embedded)), dim=-1))

    def _run_layers(self, embedded: Tensor, rows: Tensor, attention: dict[str, Any]) -> Tensor:
        return self.final_layernorm(self.layers[0](rows, **attention))

    @staticmethod
    def load(
        layers: MtpLayers, target: TensorSource, embedding: Tensor, dtype: DType, device: torch.device | str
    ) -> MtpHead:
        """``embedding`` [V, H]: the target's. Raises ``ModelError``."""
        head, source = layers.bare_head(embedding), layers.source
        head.rotary_emb = Qwen2RotaryEmbedding(head.config).to(device)
        places = {_stored_name(name): name for name in head.state_dict()}
        weights: dict[str, Tensor] = {}
        for stored, tensor in source.tensors(places, dtype, device):
            source.check_shape(stored, tensor, tuple(head.get_parameter(places[stored]).shape))
            weights[places[stored]] = tensor
        head.load_state_dict(weights, assign=True)
        ((_, norm),) = target.tensors([f"{PREFIX}norm.weight"], "float32", device)
        scale = head.hidden_layernorm.weight.detach().float() / norm_scale(target.config, norm)
        head.scale = scale.masked_fill(~scale.isfinite(), 0.0)  # of what such a norm leaves out nothing is known
        return head.eval().requires_grad_(False)
