"""The EAGLE-1/2 draft head and its published checkpoint format. Knows one layer; nothing of trees or slots.

A checkpoint is ``config.json`` (a Llama config with one layer) and ``model.safetensors`` or ``pytorch_model.bin`` with
``fc.*`` and ``layers.0.*``. It has no input norm, no final norm, no head; the embedding is the target's unless the file
brings ``embed_tokens.weight``. Our own heads add what no other reader minds: ``hit_rates`` in the config, and
``vocabulary.safetensors`` with the ids of the tokens that are worth a guess, of a large vocabulary.

Where config and tensors differ, the tensors are right, since configs are often copies of the target's: a linear layer
has a bias where the file has one for it (whatever ``bias``, ``qkv_bias``, ``attention_bias`` and ``mlp_bias`` say), and
an attention head is as large as the rows of ``q_proj`` by ``num_attention_heads`` (whatever ``head_dim`` says).

Rotary scaling is what the config says, as transformers understands it and with the config's ``rope_theta``: ``llama3``
and ``yarn`` as well as ``linear`` and ``dynamic``. EAGLE's own code knows the last two alone, over a theta of 10000,
and refuses others: so its heads for Llama 3.1 are trained without, have none in their configs, and get none here. A
head with ``llama3`` in its config comes from other code, ours for one, and is taken at its word. A wrong one costs
guesses, never the text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from flowspec.core import DType
from flowspec.errors import ModelError
from flowspec.model.draft_files import CONFIG, SAFETENSORS, DraftFiles, check_fits, layer_config, take_head_dim
from flowspec.model.draft_head import DraftHead
from flowspec.model.tensor_files import open_tensors, save_tensors

_VOCABULARY, _TOKEN_IDS = "vocabulary.safetensors", "token_ids"
_EMBEDDING = "embed_tokens.weight"
_IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")  # recomputed; the target's own
_BIAS = ".bias"
_ATTENTION, _MLP = "layers.0.self_attn.", "layers.0.mlp."
_QUERY = f"{_ATTENTION}q_proj"
_INPUTS = frozenset({_QUERY, f"{_ATTENTION}k_proj", f"{_ATTENTION}v_proj"})
_OUTPUT = f"{_ATTENTION}o_proj"


class EagleHead(DraftHead):
    """EAGLE-1/2 draft head: ``fc([embedding(x[t+1]); f[t]])`` -> one Llama decoder layer -> ``f^[t+1]``.

    The feature ``f`` is the target's output after its final norm; the target's ``lm_head`` turns ``f^`` into logits.
    The row of token ``x[p]`` is fed with ``f[p-1]``, has rotary position ``p - 1`` and predicts ``f[p]``, whose logits
    are those of ``x[p+1]``.
    """

    token_ids: Tensor | None = None  # [N], ascending: the only ones that are to be guessed, if not all

    def __init__(self, config: LlamaConfig, embedding: Tensor, biases: Set[str] | None = None) -> None:
        """``embedding`` [V, H] is the target's, shared and never trained.

        ``biases``: the names of the linear layers that have one; by default those that the config speaks of.
        """
        super().__init__(config, embedding)
        size = config.hidden_size
        biases = _flagged_biases(config) if biases is None else biases
        self.fc = nn.Linear(2 * size, size, bias="fc" in biases)
        layer: Any = LlamaDecoderLayer(config, layer_idx=0)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self._set_biases(biases)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def _join(self, embedded: Tensor, features: Tensor) -> Tensor:
        return self.fc(torch.cat((embedded, features), dim=-1))

    def _run_layers(self, embedded: Tensor, rows: Tensor, attention: dict[str, Any]) -> Tensor:
        return self.layers[0](rows, **attention)

    def features_of(self, read: Tensor) -> Tensor:
        """What came of the target's final norm [n, H] is a feature as it is."""
        return read

    @classmethod
    def load(cls, directory: Path, embedding: Tensor, dtype: DType, device: torch.device | str) -> EagleHead:
        """Read a published or a trained head for the target whose embedding is ``embedding`` [V, H].

        Raises ``ModelError`` for a missing, truncated or unsupported checkpoint, and for one of another target.
        """
        torch_dtype: torch.dtype = getattr(torch, dtype)
        files = DraftFiles(directory)
        config = layer_config(files.config, files.config_path, LlamaConfig)
        shapes = files.shapes
        check_fits(directory, config, *embedding.shape)
        if _EMBEDDING in shapes:
            if shapes[_EMBEDDING] != tuple(embedding.shape):
                raise files.wrong_shape(_EMBEDDING, tuple(embedding.shape))
            embedding = files.tensor(_EMBEDDING)
        take_head_dim(config, shapes.get(f"{_QUERY}.weight"))
        with torch.device("meta"):
            biases = {name.removesuffix(_BIAS) for name in shapes if name.endswith(_BIAS)}
            head = cls(config, embedding.to(device, torch_dtype), biases)
        head.rotary_emb = LlamaRotaryEmbedding(config).to(device)
        expected = head.state_dict()
        missing = sorted(expected.keys() - shapes.keys())
        if missing:
            raise ModelError(
                f"{files.path} lacks {', '.join(missing)}; this is no EAGLE-1/2 head of the sizes in {CONFIG}, "
                "or the download is incomplete"
            )
        known = expected.keys() | {_EMBEDDING}
        unknown = sorted(name for name in shapes if name not in known and not name.endswith(_IGNORED))
        if unknown:
            raise ModelError(f"{files.path} has unknown tensors {', '.join(unknown[:4])}; give an EAGLE head")
        for name, tensor in expected.items():
            if shapes[name] != tuple(tensor.shape):
                raise files.wrong_shape(name, tuple(tensor.shape))
        weights = {name: files.tensor(name).to(device, torch_dtype) for name in expected}
        head.load_state_dict(weights, assign=True)
        head.token_ids = _read_vocabulary(directory / _VOCABULARY, len(embedding))
        return head.eval().requires_grad_(False)

    def note_hit_rates(self, rates: Sequence[float]) -> None:
        """Keep in the config how often the first guess is right at draft level 1, 2, ...; see ``draft.base``."""
        self.config.hit_rates = [round(rate, 4) for rate in rates]

    def save(self, directory: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write ``config.json`` and ``model.safetensors``; each file is replaced at once or not at all."""
        has_bias = {name.removesuffix(_BIAS) for name in self.state_dict() if name.endswith(_BIAS)}
        config = self.config.to_dict() | {
            "architectures": ["LlamaForCausalLM"],
            "bias": "fc" in has_bias,
            "qkv_bias": _QUERY in has_bias,
            "attention_bias": _OUTPUT in has_bias,
            "dtype": str(dtype).removeprefix("torch."),
        }
        config.pop("_name_or_path", None)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        save_tensors(directory / SAFETENSORS, self.state_dict(), dtype)
        if self.token_ids is not None:
            save_tensors(directory / _VOCABULARY, {_TOKEN_IDS: self.token_ids.int()}, dtype)
        partial = directory / f".{CONFIG}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, directory / CONFIG)


def _flagged_biases(config: LlamaConfig) -> set[str]:
    """``bias`` and ``qkv_bias`` are EAGLE's words, the others transformers'."""
    flags = {
        "fc": getattr(config, "bias", True),
        **dict.fromkeys(_INPUTS, getattr(config, "qkv_bias", False) or config.attention_bias),
        _OUTPUT: config.attention_bias,
        **dict.fromkeys((f"{_MLP}gate_proj", f"{_MLP}up_proj", f"{_MLP}down_proj"), config.mlp_bias),
    }
    return {name for name, has_bias in flags.items() if has_bias}


def _read_vocabulary(path: Path, vocab_size: int) -> Tensor | None:
    """int64 [N]; ``None`` without a file."""
    if not path.is_file():
        return None
    with open_tensors(path) as file:
        token_ids = file.get_tensor(_TOKEN_IDS) if _TOKEN_IDS in file.keys() else None  # noqa: SIM118
    is_list = token_ids is not None and token_ids.ndim == 1 and not token_ids.is_floating_point() and len(token_ids) > 0
    if token_ids is None or not is_list:
        raise ModelError(f"{path} holds no list of {_TOKEN_IDS}; fetch it again, or remove it to draft with all tokens")
    token_ids = token_ids.long()
    if token_ids.min() < 0 or token_ids.max() >= vocab_size or not (token_ids.diff() > 0).all():
        raise ModelError(
            f"{path}: {_TOKEN_IDS} must ascend, and lie in a vocabulary of {vocab_size}; give the head that belongs to "
            "the target, or remove the file to draft with all tokens"
        )
    return token_ids
