"""Models in GGUF files, as llama.cpp's users have them: config, tokenizer and tensors of one file, or of its parts.

Tensors get transformers' names and order of rows. Their values are dequantised by the ``gguf`` package; integer kernels
take the codes of the types that they can hold, as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowspec.core import DType, LayerRange
from flowspec.errors import ModelError, first_line
from flowspec.model.families import EMBEDDING, FAMILIES, LM_HEAD
from flowspec.model.fetched import draft_directory_of, name_for_workers
from flowspec.model.gguf_architectures import architecture_of
from flowspec.model.gguf_blocks import is_held, own_bits, packed_blocks
from flowspec.model.gguf_config import CONFIG_TENSORS, ConfigReader
from flowspec.model.gguf_header import Header, TensorPlace
from flowspec.model.gguf_tokenizer import read_tokenizer, set_pre_tokenizer
from flowspec.model.loader import Checkpoint
from flowspec.model.packed import Bits, PackedWeight
from flowspec.model.tensor_files import StoredTensor

GGUF_SUFFIX = ".gguf"

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_CHUNK = 4096  # rows that are dequantised at once

_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": LM_HEAD,
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GGUFCheckpoint(Checkpoint):
    """One model. Every failure is a ``ModelError`` that names the file and the way out."""

    def __init__(self, path: Path, values: Mapping[str, Any], places: Mapping[str, TensorPlace]) -> None:
        """``values``: the file's metadata; ``places``: of its tensors, by transformers' names."""
        self._path = path
        self.values = dict(values)
        self._places = dict(places)
        self._architecture = architecture_of(values, path)
        told = ConfigReader(path, self._architecture, self.values, self._places, self._read_floats)
        super().__init__(str(path), None, told.read())

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
        names = architecture_of(headers[0].values, path).layer_names
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

    @cached_property
    def own_bits(self) -> Bits | None:
        """Of the kernels that lose next to nothing of the file's numbers; ``None`` where it has floats."""
        return own_bits({name: (place.kind, math.prod(place.shape)) for name, place in self._places.items()})

    def has_four_bits(self, name: str) -> bool:
        return is_held(self._place(name).kind, 4)

    def files(self) -> list[Path]:
        return sorted({place.path for place in self._places.values()})

    def stored_names(self) -> frozenset[str]:
        return frozenset(self._places)

    def names_of_stage(self, layers: LayerRange) -> list[str]:
        """With what the config is made of."""
        return [*super().names_of_stage(layers), *sorted(CONFIG_TENSORS & self._places.keys())]

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
            tensor = torch.empty(place.shape, dtype=wanted)
            for rows, raw in zip(tensor.view(-1, place.shape[-1]).split(_CHUNK), self._raw_chunks(place), strict=True):
                rows.copy_(torch.from_numpy(self._floats(place, raw)))
            if name.endswith("norm.weight"):  # stored as what rows are multiplied by
                tensor = tensor - self._norm_offset
            if (order := self._row_order(name, place)) is not None:
                tensor = tensor[torch.from_numpy(order)]
            yield name, tensor.to(device)

    def own_packed(self, name: str, bits: Bits) -> PackedWeight | None:
        place = self._place(name)
        if not is_held(place.kind, bits):
            return None
        weight = packed_blocks(place.kind, np.concatenate(list(self._raw_chunks(place))), bits)
        order = self._row_order(name, place)
        return weight if order is None else weight.rows(order)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = read_tokenizer(self._path, self._architecture.name)
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

    def _read_floats(self, name: str) -> NDArray[np.float32]:
        place = self._place(name)
        return self._floats(place, np.concatenate(list(self._raw_chunks(place))))

    def _floats(self, place: TensorPlace, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            return gguf.dequantize(raw, place.kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ModelError(
                f"{self._path} has tensors of the type {place.kind.name}, which cannot be read; convert the model to a "
                "type such as Q8_0 or Q4_K"
            ) from error

    def _row_order(self, name: str, place: TensorPlace) -> NDArray[np.int64] | None:
        """How rows are put back that have the two halves of each head interleaved."""
        if not self._architecture.interleaves_heads:
            return None
        if ".q_proj." in name:
            num_heads = self.config.num_attention_heads
        elif ".k_proj." in name:
            num_heads = self.config.num_key_value_heads
        else:
            return None
        return np.arange(place.shape[0]).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _torch_name(name: str, layer_names: Mapping[str, str]) -> str:
    """transformers' name of a tensor; the file's own where it has none."""
    if (match := _LAYER_TENSOR.fullmatch(name)) and match[2] in layer_names:
        return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"
    if match:  # what no layer has a place for must be found as one of this layer's
        return f"model.layers.{match[1]}.{match[2]}.{match[3]}"
    return _NAMES.get(name, name)
