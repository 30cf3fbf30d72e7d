"""Models in GGUF files, as llama.cpp's users have them: config, tokenizer and tensors of one file, or of its parts.

Tensors get transformers' names and order of rows. Their values are dequantised by the ``gguf`` package; integer kernels
take the codes of the types that they can hold, as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from flowspec.core import DType, LayerRange
from flowspec.errors import ModelError, first_line
from flowspec.model.families import EMBEDDING, FAMILIES, FULL, LM_HEAD, SLIDING
from flowspec.model.fetched import draft_directory_of, name_for_workers
from flowspec.model.gguf_header import Header, TensorPlace
from flowspec.model.gguf_tokenizer import set_pre_tokenizer
from flowspec.model.loader import Checkpoint
from flowspec.model.packed import GROUP, Bits, PackedWeight
from flowspec.model.tensor_files import StoredTensor

GGUF_SUFFIX = ".gguf"

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}  # by architecture
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_CHUNK = 4096  # rows that are dequantised at once
_FLOATS = {Kind.F32, Kind.F16, Kind.BF16}

_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": LM_HEAD,
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What Gemma 3's files leave to who reads them: one of six layers sees all, the others turn keys by a base of their own.
_GEMMA_PATTERN, _GEMMA_LOCAL_BASE, _GEMMA_27B_LAYERS = 6, 10000.0, 62
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"  # of the rotary frequencies: what config.json says as rope_type llama3


class GGUFCheckpoint(Checkpoint):
    """One model. Every failure is a ``ModelError`` that names the file and the way out."""

    def __init__(self, path: Path, values: Mapping[str, Any], places: Mapping[str, TensorPlace]) -> None:
        """``values``: the file's metadata; ``places``: of its tensors, by transformers' names."""
        self._path = path
        self.values = dict(values)
        self._places = dict(places)
        super().__init__(str(path), None, self._read_config())

    @classmethod
    def open(cls, name: str | Path) -> GGUFCheckpoint:
        """Read the metadata of the file, and of its other parts if it is a part."""
        path = Path(name).expanduser()
        if not path.is_file():
            raise ModelError(f"{name} is no file here; give the path of a .gguf file that was downloaded")
        headers = [Header.read(path)]
        num_parts = headers[0].values.get("split.count", 1)
        if num_parts > 1:
            match = _SPLIT_NAME.fullmatch(path.name)
            if match is None or int(match[3]) != num_parts:
                raise ModelError(f"{path} is one of {num_parts} parts, but is not named so; give them their names back")
            names = [f"{match[1]}-{part:05}-of-{match[3]}.gguf" for part in range(1, num_parts + 1)]
            if missing := [part for part in names if not path.with_name(part).is_file()]:
                raise ModelError(f"{path}: {missing[0]} is missing beside it; all {num_parts} parts are needed")
            headers = [Header.read(path.with_name(part)) for part in names]
        tensors = {name: place for header in headers for name, place in header.tensors.items()}
        names = GEMMA_NAMES if headers[0].values.get("general.architecture") == "gemma3" else LAYER_NAMES
        return cls(path, headers[0].values, {_torch_name(name, names): place for name, place in tensors.items()})

    @property
    def full_name(self) -> str:
        return name_for_workers(self._path)

    @property
    def _norm_offset(self) -> float:
        return FAMILIES[self.config.model_type].norm_offset

    @property
    def title(self) -> str:
        return self._path.name.removesuffix(GGUF_SUFFIX)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """GGUF has none."""
        return {}

    @property
    def draft_directory(self) -> Path:
        return draft_directory_of(self._path)

    @property
    def own_bits(self) -> Bits | None:
        """Of the kernels that lose next to nothing of the file's numbers; ``None`` where it has floats."""
        kinds = {place.kind for name, place in self._places.items() if ".layers." in name} - _FLOATS
        if not kinds:
            return None
        return 4 if kinds == {Kind.Q4_0} else 8

    def files(self) -> list[Path]:
        return sorted({place.path for place in self._places.values()})

    def stored_names(self) -> frozenset[str]:
        return frozenset(self._places)

    def names_of_stage(self, layers: LayerRange) -> list[str]:
        """With what the config is made of."""
        return [*super().names_of_stage(layers), *({_ROPE_FACTORS} & self._places.keys())]

    def shard_of(self, tensor_name: str) -> str:
        return self._place(tensor_name).path.name

    @property
    def revision(self) -> str:
        """A file has none."""
        return ""

    def stored(self, name: str) -> StoredTensor:
        place = self._place(name)
        num_rows = int(np.prod(place.shape[:-1], dtype=np.int64))
        return StoredTensor(place.path, place.offset, num_rows * place.row_bytes, place.kind.name, place.shape)

    def tensors(self, names: Iterable[str], dtype: DType, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        wanted = getattr(torch, dtype)
        for name in names:
            place = self._place(name)
            parts = [torch.from_numpy(self._floats(place, rows)).to(wanted) for rows in self._raw_chunks(place)]
            tensor = torch.cat(parts).reshape(place.shape)
            if name.endswith("norm.weight"):  # stored as what rows are multiplied by
                tensor = tensor - self._norm_offset
            if (order := self._row_order(name, place)) is not None:
                tensor = tensor[torch.from_numpy(order)]
            yield name, tensor.to(device)

    def own_packed(self, name: str, bits: Bits) -> PackedWeight | None:
        place = self._place(name)
        if place.kind != Kind.Q4_0 and not (place.kind == Kind.Q8_0 and bits == 8):
            return None
        blocks = np.concatenate(list(self._raw_chunks(place))).reshape(place.shape[0], place.shape[1] // GROUP, -1)
        if (order := self._row_order(name, place)) is not None:
            blocks = blocks[order]
        scales = blocks[..., :2].copy().view(np.float16)
        if place.kind == Kind.Q8_0:
            return PackedWeight(blocks[..., 2:].copy().view(np.int8), scales, None)
        codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=2)
        if bits == 8:
            return PackedWeight(codes.astype(np.int8) - np.int8(8), scales, None)
        return PackedWeight(codes, scales, np.full(scales.shape, 8, dtype=np.uint8))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._path.parent, gguf_file=self._path.name, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(
                f"{self.name}: its tokenizer cannot be loaded ({first_line(error)}); convert the model again, or use "
                "its directory with tokenizer.json"
            ) from error
        set_pre_tokenizer(tokenizer, self.values.get("tokenizer.ggml.pre"))
        return tokenizer

    def _place(self, name: str) -> TensorPlace:
        if name not in self._places:
            raise ModelError(f"{self._path} holds no tensor for {name}; download or convert the model again")
        return self._places[name]

    def _raw_chunks(self, place: TensorPlace) -> Iterator[NDArray[np.uint8]]:
        """The stored bytes [rows, bytes of a row], some rows at a time, in private memory."""
        num_rows = int(np.prod(place.shape[:-1], dtype=np.int64))
        for start in range(0, num_rows, _CHUNK):
            rows = min(_CHUNK, num_rows - start)
            offset, num_bytes = place.offset + start * place.row_bytes, rows * place.row_bytes
            try:
                yield np.fromfile(place.path, np.uint8, num_bytes, offset=offset).reshape(rows, place.row_bytes)
            except (OSError, ValueError) as error:
                raise ModelError(f"{place.path} cannot be read ({first_line(error)}); is it still there?") from error

    def _floats(self, place: TensorPlace, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            return gguf.dequantize(raw, place.kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ModelError(
                f"{self._path} has tensors of the type {place.kind.name}, which cannot be read; convert the model to a "
                "type such as Q8_0 or Q4_K"
            ) from error

    def _row_order(self, name: str, place: TensorPlace) -> NDArray[np.int64] | None:
        """Llama's queries and keys have the two halves of each head interleaved in GGUF."""
        if self.config.model_type != "llama":
            return None
        if ".q_proj." in name:
            num_heads = self.config.num_attention_heads
        elif ".k_proj." in name:
            num_heads = self.config.num_key_value_heads
        else:
            return None
        return np.arange(place.shape[0]).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)

    # --- config ---

    def _value(self, name: str, default: Any = None) -> Any:
        """Of the model's own architecture."""
        return self.values.get(f"{self.values['general.architecture']}.{name}", default)

    def _number(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self._path}: its metadata says {value!r} as {name}; convert the model again")
        return value

    def _read_config(self) -> PreTrainedConfig:
        architecture = self.values.get("general.architecture")
        if architecture not in _MODEL_TYPES:
            raise ModelError(
                f"{self._path}: its architecture is {architecture!r}, which flowspec cannot read from GGUF; supported "
                f"are {', '.join(_MODEL_TYPES)}"
            )
        num_heads, hidden_size = self._number("attention.head_count"), self._number("embedding_length")
        vocab_size = self._place(EMBEDDING).shape[0]
        fields: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._number("attention.head_count_kv", num_heads),
            "head_dim": self._number("attention.key_length", hidden_size // num_heads),
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon", 1e-6),
            "tie_word_embeddings": LM_HEAD not in self._places,
            "rope_parameters": self._rope_parameters(),
            "bos_token_id": self.values.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._end_ids() or None,
        }
        if architecture == "gemma3":
            fields |= self._gemma_fields(fields)
        if architecture == "llama":
            fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._places
            fields["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self._places
        try:
            return AutoConfig.for_model(_MODEL_TYPES[architecture], **fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{self._path}: its metadata make no config ({first_line(error)})") from error

    def _gemma_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        num_layers, per_head = fields["num_hidden_layers"], fields["hidden_size"] // fields["num_attention_heads"]
        pattern = self._number("attention.sliding_window_pattern", _GEMMA_PATTERN)
        local = {"rope_type": "default", "rope_theta": float(self._value("rope.freq_base_swa", _GEMMA_LOCAL_BASE))}
        return {
            "layer_types": [SLIDING if (index + 1) % pattern else FULL for index in range(num_layers)],
            "sliding_window": self._number("attention.sliding_window"),
            "query_pre_attn_scalar": per_head if num_layers == _GEMMA_27B_LAYERS else fields["head_dim"],
            "rope_parameters": {FULL: fields["rope_parameters"], SLIDING: local},
        }

    def _end_ids(self) -> list[int]:
        names = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = {self.values.get(f"tokenizer.ggml.{name}") for name in names}
        return sorted(token_id for token_id in found if isinstance(token_id, int))

    def _rope_parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "rope_type": self._value("rope.scaling.type", "none"),
            "rope_theta": float(self._value("rope.freq_base", 10000.0)),
        }
        if parameters["rope_type"] != "none":
            parameters["factor"] = float(self._value("rope.scaling.factor", 1.0))
            if original := self._value("rope.scaling.original_context_length"):
                parameters["original_max_position_embeddings"] = original
        elif _ROPE_FACTORS in self._places:
            parameters |= self._llama3_parameters(self._places[_ROPE_FACTORS])
        else:
            parameters["rope_type"] = "default"
        return parameters

    def _llama3_parameters(self, place: TensorPlace) -> dict[str, Any]:
        """The factors say the largest; the rest is the same in all models of Llama 3.1 to 3.3, and is checked."""
        factors = self._floats(place, np.concatenate(list(self._raw_chunks(place)))).reshape(-1)
        factor, original = float(factors.max()), 8192
        theta, dim = float(self._value("rope.freq_base", 10000.0)), 2 * len(factors)
        wavelengths = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
        share = np.clip((original / wavelengths - 1) / (4 - 1), 0, 1)
        if not np.allclose(1 / factors, (1 - share) / factor + share, rtol=1e-3):
            raise ModelError(f"{self._path}: {_ROPE_FACTORS} is no scaling of Llama 3; use the model's directory")
        names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return dict(zip(names, ("llama3", factor, 1.0, 4.0, original), strict=True))


def _torch_name(name: str, layer_names: Mapping[str, str]) -> str:
    """transformers' name of a tensor; the file's own where it has none."""
    if (match := _LAYER_TENSOR.fullmatch(name)) and match[2] in layer_names:
        return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"
    if match:  # what no layer has a place for must be found as one of this layer's
        return f"model.layers.{match[1]}.{match[2]}.{match[3]}"
    return _NAMES.get(name, name)
