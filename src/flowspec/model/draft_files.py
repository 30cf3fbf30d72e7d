"""The files of a published draft head, whatever its kind: its config, and its tensors one by one. No arithmetic."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flowspec.errors import ModelError, first_line
from flowspec.model.config_file import check_config

AnyConfig = TypeVar("AnyConfig", LlamaConfig, Qwen3Config)

CONFIG, SAFETENSORS, BIN = "config.json", "model.safetensors", "pytorch_model.bin"
INDEX = "model.safetensors.index.json"  # of a model in several files, which no head is


class DraftFiles:
    """One directory: ``config.json``, and ``model.safetensors`` or ``pytorch_model.bin``.

    Raises ``ModelError`` for what is missing, truncated, or holds more than tensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config_path = directory / CONFIG

    @cached_property
    def config(self) -> dict[str, Any]:
        """As it is written."""
        path = self.config_path
        if not path.is_file():
            raise ModelError(f"{self.directory} has no {CONFIG}; give the directory of a draft head")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _bad_config(path, error) from error
        if not isinstance(values, dict):
            raise _bad_config(path, ValueError("no JSON object"))
        return values

    @cached_property
    def path(self) -> Path:
        """Of the weights."""
        for name in (SAFETENSORS, BIN):
            if (self.directory / name).is_file():
                return self.directory / name
        raise ModelError(f"{self.directory} has neither {SAFETENSORS} nor {BIN}; fetch or train the head again")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name; nothing of a safetensors file is read but its header."""
        if self.path.name == BIN:
            return {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self._truncated(error) from error

    def tensor(self, name: str) -> Tensor:
        """One of them, as it is stored."""
        if self.path.name == BIN:
            return self._pickled[name]
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._truncated(error) from error

    def columns(self, name: str, start: int, end: int) -> Tensor:
        """Some columns of a matrix, as it is stored; nothing else of it is kept in memory."""
        if self.path.name == BIN:
            return self._pickled[name][:, start:end]
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return file.get_slice(name)[:, start:end]
        except (SafetensorError, OSError) as error:
            raise self._truncated(error) from error

    def wrong_shape(self, name: str, wanted: tuple[int, ...]) -> ModelError:
        """The tensor has another one."""
        return ModelError(
            f"{self.path}: {name} has shape {list(self.shapes[name])}, but {list(wanted)} is needed; {CONFIG}, weights "
            "and target do not belong together, so fetch the head again, config and weights from one place"
        )

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        path = self.path
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not all(isinstance(tensor, Tensor) for tensor in found.values()):
                raise ValueError("it is no table of tensors")
        except OSError as error:
            raise self._truncated(error) from error
        except Exception as error:  # torch.load raises whatever the broken bytes lead to
            raise ModelError(
                f"{path} is truncated or holds more than tensors ({error}); fetch the file again"
            ) from error
        return found

    def _truncated(self, error: Exception) -> ModelError:
        kind = "no safetensors file" if self.path.name == SAFETENSORS else "no file of tensors"
        return ModelError(f"{self.path} is truncated or {kind} ({error}); fetch the file again")


def holds_model(files: DraftFiles) -> bool:
    """Whether a directory holds a whole language model, by its tensors: those of heads have other names among them.

    Configs do not tell: those of heads are written as if they were of a model.
    """
    if (files.directory / INDEX).is_file():
        return True
    try:
        names = {name.removeprefix("model.") for name in files.shapes}
    except ModelError:
        return False  # whoever loads it as a head says what is wrong
    is_head = any(name.startswith(("fc.", "midlayer.")) or "hidden_norm" in name for name in names)
    return not is_head and {"embed_tokens.weight", "layers.0.input_layernorm.weight", "norm.weight"} <= names


def layer_config(values: Mapping[str, Any], path: Path, kind: type[AnyConfig]) -> AnyConfig:
    """The sizes of a head's layers, which are of a kind of their own whatever the target's family.

    Raises ``ModelError``.
    """
    try:
        check_config({**values, "head_dim": None}, str(path))  # which need not be right: the tensors decide
        config = kind.from_dict({key: value for key, value in values.items() if key != "model_type"})
    except ModelError:
        raise
    except Exception as error:  # whatever transformers meets in what somebody has written
        raise _bad_config(path, error) from error
    rope: Any = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ModelError(
            f"{path}: rotary scaling {rope_type!r} is unknown; known are {', '.join(ROPE_INIT_FUNCTIONS)}: mend "
            "rope_scaling there, or take it out if the head was trained without"
        )
    return config


def take_head_dim(config: LlamaConfig | Qwen3Config, query_shape: tuple[int, ...] | None) -> None:
    """From the rows of ``q_proj``; EAGLE's rule where that is no size of a head, and the shape is an error later."""
    num_rows = query_shape[0] if query_shape is not None and len(query_shape) == 2 else 0
    head_dim, rest = divmod(num_rows, config.num_attention_heads)
    is_size = head_dim > 0 and head_dim % 2 == 0 and not rest  # rotary embeddings turn pairs
    config.head_dim = head_dim if is_size else config.hidden_size // config.num_attention_heads


def check_fits(directory: Path, config: PreTrainedConfig, vocab_size: int, hidden_size: int | None = None) -> None:
    """Against the target's sizes; ``None``: it may differ. Raises ``ModelError``."""
    if hidden_size is not None and config.hidden_size != hidden_size:
        raise ModelError(
            f"the head in {directory} has hidden size {config.hidden_size}, the target {hidden_size}; "
            "give a head that was trained for this target"
        )
    if config.vocab_size != vocab_size:
        raise ModelError(
            f"the head in {directory} has a vocabulary of {config.vocab_size}, the target of {vocab_size}; "
            "give a head that was trained for this target"
        )


def _bad_config(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is no valid model config ({first_line(error)}); fetch the file again")
