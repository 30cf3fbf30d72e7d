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
import zipfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from flowspec.core import DType
from flowspec.errors import ModelError, first_line
from flowspec.model.config_file import check_config
from flowspec.model.kv_cache import CACHE_ARGUMENT
from flowspec.model.tensor_files import save_tensors

_CONFIG, _SAFETENSORS, _BIN = "config.json", "model.safetensors", "pytorch_model.bin"
_VOCABULARY, _TOKEN_IDS = "vocabulary.safetensors", "token_ids"
_EMBEDDING = "embed_tokens.weight"
_IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")  # recomputed; the target's own
_BIAS = ".bias"
_ATTENTION, _MLP = "layers.0.self_attn.", "layers.0.mlp."
_QUERY = f"{_ATTENTION}q_proj"
_INPUTS = frozenset({_QUERY, f"{_ATTENTION}k_proj", f"{_ATTENTION}v_proj"})
_OUTPUT = f"{_ATTENTION}o_proj"
_EAGLE3_KEYS = ("midlayer.", "d2t", "t2d")


class DraftCache(Protocol):
    """Where the head keeps keys and values, [B, heads, rows, head size]; ``layer_idx`` is always 0."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, /, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new rows; return all that the mask's columns speak of."""
        ...


class EagleHead(nn.Module):
    """EAGLE-1/2 draft head: ``fc([embedding(x[t+1]); f[t]])`` -> one Llama decoder layer -> ``f^[t+1]``.

    The feature ``f`` is the target's output after its final norm; the target's ``lm_head`` turns ``f^`` into logits.
    The row of token ``x[p]`` is fed with ``f[p-1]``, has rotary position ``p - 1`` and predicts ``f[p]``, whose logits
    are those of ``x[p+1]``.
    """

    embedding: Tensor
    token_ids: Tensor | None = None  # [N], ascending: the only ones that are to be guessed, if not all

    def __init__(self, config: LlamaConfig, embedding: Tensor, biases: Set[str] | None = None) -> None:
        """``embedding`` [V, H] is the target's, shared and never trained.

        ``biases``: the names of the linear layers that have one; by default those that the config speaks of.
        """
        super().__init__()
        config._attn_implementation = "sdpa"  # takes batches, and assumes nothing of rows where a mask is given
        size = config.hidden_size
        self.config = config
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        biases = _flagged_biases(config) if biases is None else biases
        self.fc = nn.Linear(2 * size, size, bias="fc" in biases)
        layer: Any = LlamaDecoderLayer(config, layer_idx=0)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        linears = [(name, module) for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            if (linear.bias is not None) != (name in biases):
                self.set_submodule(name, nn.Linear(linear.in_features, linear.out_features, bias=name in biases))
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(
        self,
        token_ids: Tensor,
        features: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: DraftCache | None = None,
    ) -> Tensor:
        """Predicted features [B, T, H].

        ``token_ids`` [B, T]; ``features`` [B, T, H], of the token before each; ``position_ids`` [B, T], the token's
        position less one; ``attention_mask`` bool, [B or 1, 1, T, KV], true where a row sees a key. ``cache``:
        anything with transformers' ``update(keys, values, layer_idx)``; it gets the new keys and values as layer 0's.
        """
        embedded = F.embedding(token_ids, self.embedding).to(features.dtype)
        rows = self.fc(torch.cat((embedded, features), dim=-1))
        return self.layers[0](
            rows,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            position_embeddings=self.rotary_emb(rows, position_ids),
            **{CACHE_ARGUMENT: cache},
        )

    @classmethod
    def load(cls, directory: Path, embedding: Tensor, dtype: DType, device: torch.device | str) -> EagleHead:
        """Read a published or a trained head for the target whose embedding is ``embedding`` [V, H].

        Raises ``ModelError`` for a missing, truncated or unsupported checkpoint, and for one of another target.
        """
        torch_dtype: torch.dtype = getattr(torch, dtype)
        config = _read_config(directory / _CONFIG)
        path = _weights_path(directory)
        weights = _read_weights(path)
        _check_version(path, weights)
        _check_fits(directory, config, embedding)
        if _EMBEDDING in weights:
            own = weights[_EMBEDDING]
            if own.shape != embedding.shape:
                raise ModelError(_wrong_shape(path, _EMBEDDING, own, embedding))
            embedding = own
        _take_head_dim(config, weights)
        with torch.device("meta"):
            biases = {name.removesuffix(_BIAS) for name in weights if name.endswith(_BIAS)}
            head = cls(config, embedding.to(device, torch_dtype), biases)
        head.rotary_emb = LlamaRotaryEmbedding(config).to(device)
        expected = head.state_dict()
        missing = sorted(expected.keys() - weights.keys())
        if missing:
            raise ModelError(
                f"{path} lacks {', '.join(missing)}; this is no EAGLE-1/2 head of the sizes in {_CONFIG}, "
                "or the download is incomplete"
            )
        known = expected.keys() | {_EMBEDDING}
        unknown = sorted(name for name in weights if name not in known and not name.endswith(_IGNORED))
        if unknown:
            raise ModelError(f"{path} has unknown tensors {', '.join(unknown[:4])}; give an EAGLE-1 or EAGLE-2 head")
        for name, tensor in expected.items():
            if weights[name].shape != tensor.shape:
                raise ModelError(_wrong_shape(path, name, weights[name], tensor))
        head.load_state_dict({name: weights[name].to(device, torch_dtype) for name in expected}, assign=True)
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
        save_tensors(directory / _SAFETENSORS, self.state_dict(), dtype)
        if self.token_ids is not None:
            save_tensors(directory / _VOCABULARY, {_TOKEN_IDS: self.token_ids}, torch.int32)
        partial = directory / f".{_CONFIG}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, directory / _CONFIG)


def _read_config(path: Path) -> LlamaConfig:
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {_CONFIG}; give the directory of an EAGLE-1/2 head")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        check_config({**values, "head_dim": None}, str(path))  # which need not be right: see above
        # The head is a Llama layer whatever the target's family; only the sizes are taken from its name's config.
        config = LlamaConfig.from_dict({key: value for key, value in values.items() if key != "model_type"})
    except ModelError:
        raise
    except Exception as error:  # whatever transformers meets in what somebody has written
        raise ModelError(f"{path} is no valid model config ({first_line(error)}); fetch the file again") from error
    rope: Any = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ModelError(
            f"{path}: rotary scaling {rope_type!r} is unknown; known are {', '.join(ROPE_INIT_FUNCTIONS)}: mend "
            "rope_scaling there, or take it out if the head was trained without"
        )
    return config


def _flagged_biases(config: LlamaConfig) -> set[str]:
    """``bias`` and ``qkv_bias`` are EAGLE's words, the others transformers'."""
    flags = {
        "fc": getattr(config, "bias", True),
        **dict.fromkeys(_INPUTS, getattr(config, "qkv_bias", False) or config.attention_bias),
        _OUTPUT: config.attention_bias,
        **dict.fromkeys((f"{_MLP}gate_proj", f"{_MLP}up_proj", f"{_MLP}down_proj"), config.mlp_bias),
    }
    return {name for name, has_bias in flags.items() if has_bias}


def _take_head_dim(config: LlamaConfig, weights: dict[str, Tensor]) -> None:
    """From the rows of ``q_proj``; EAGLE's rule where that is no size of a head, and the shape is an error later."""
    queries = weights.get(f"{_QUERY}.weight")
    num_rows = len(queries) if queries is not None and queries.ndim == 2 else 0
    head_dim, rest = divmod(num_rows, config.num_attention_heads)
    is_size = head_dim > 0 and head_dim % 2 == 0 and not rest  # rotary embeddings turn pairs
    config.head_dim = head_dim if is_size else config.hidden_size // config.num_attention_heads


def _weights_path(directory: Path) -> Path:
    for name in (_SAFETENSORS, _BIN):
        if (directory / name).is_file():
            return directory / name
    raise ModelError(f"{directory} has neither {_SAFETENSORS} nor {_BIN}; fetch or train the head again")


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.name == _SAFETENSORS:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or no safetensors file ({error}); fetch the file again") from error
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise ModelError(f"{path} is truncated or holds more than tensors ({error}); fetch the file again") from error


def _read_vocabulary(path: Path, vocab_size: int) -> Tensor | None:
    """int64 [N]; ``None`` without a file."""
    if not path.is_file():
        return None
    token_ids = _read_weights(path).get(_TOKEN_IDS)
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


def _check_version(path: Path, weights: dict[str, Tensor]) -> None:
    fc = weights.get("fc.weight")
    # EAGLE-3 joins the features of three layers before it meets the embedding.
    is_three_wide = fc is not None and fc.ndim == 2 and fc.shape[1] == 3 * fc.shape[0]
    if is_three_wide or any(key.startswith(_EAGLE3_KEYS) for key in weights):
        raise ModelError(f"{path} is an EAGLE-3 head, which is not supported yet; give an EAGLE-1 or EAGLE-2 head")


def _check_fits(directory: Path, config: LlamaConfig, embedding: Tensor) -> None:
    vocab_size, hidden_size = embedding.shape
    if config.hidden_size != hidden_size:
        raise ModelError(
            f"the head in {directory} has hidden size {config.hidden_size}, the target {hidden_size}; "
            "give a head that was trained for this target"
        )
    if config.vocab_size != vocab_size:
        raise ModelError(
            f"the head in {directory} has a vocabulary of {config.vocab_size}, the target of {vocab_size}; "
            "give a head that was trained for this target"
        )


def _wrong_shape(path: Path, name: str, found: Tensor, wanted: Tensor) -> str:
    return (
        f"{path}: {name} has shape {list(found.shape)}, but {list(wanted.shape)} is needed; {_CONFIG}, weights and "
        "target do not belong together, so fetch the head again, config and weights from one place"
    )
