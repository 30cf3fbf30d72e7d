"""What the checkpoints of all heads that read several of the target's layers have in common, whatever their dialect.

``fc.weight`` [D, n H], of which the target's stages multiply by their own columns; ``lm_head.weight`` [N, D] over a
reduced vocabulary with ``d2t`` [N], where draft token i is the target's token ``i + d2t[i]``; ``embed_tokens.weight``
[V, D] where it is not the target's. ``t2d`` is of use in training alone.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from flowspec.core import TapShape
from flowspec.errors import ModelError, shortened
from flowspec.model.draft_files import DraftFiles, check_fits, layer_config, take_head_dim

FC = "fc.weight"
EMBEDDING, HEAD, IDS = "embed_tokens.weight", "lm_head.weight", "d2t"
FIRST = "layers.0."
CONTAINER = "speculators_model_type"
SUPPORTED = "give an EAGLE-1, EAGLE-2, EAGLE-3, P-EAGLE, DFlash, DFlash2 or DSpark head, or 'ngram'"
_IGNORED = re.compile(r"t2d|.*rotary_emb\.inv_freq|verifier_(norm|lm_head)\.weight")
_LAYER = re.compile(r"layers\.(\d+)\.")


AnyForm = TypeVar("AnyForm", bound="HeadTensors")


class TargetSizes(NamedTuple):
    """Of the model that a head is for."""

    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class HeadTensors(ABC):
    """A checkpoint that has been looked through, and fits its target: names and shapes, but no tensor is read yet."""

    kind: ClassVar[str]  # for people

    files: DraftFiles
    config: LlamaConfig | Qwen3Config  # of the head's layers
    names: Mapping[str, str]  # the names used here -> the file's
    layer_ids: tuple[int, ...]  # of the target, in the order of fc's blocks; as in ``TapShape.layers``
    target_size: int  # H

    @classmethod
    def read(
        cls: type[AnyForm],
        files: DraftFiles,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        draft_layers: Sequence[int] | None = None,
    ) -> AnyForm:
        """Sizes are the target's; ``draft_layers`` overrule what the config says of layers.

        Raises ``ModelError`` for a checkpoint that lacks something, contradicts itself, or is of another target.
        """
        found = cls(**cls._fields(files, TargetSizes(num_layers, hidden_size, vocab_size), draft_layers))
        found.check(vocab_size)
        return found

    @classmethod
    @abstractmethod
    def _fields(cls, files: DraftFiles, target: TargetSizes, draft_layers: Sequence[int] | None) -> dict[str, Any]:
        """Of the class, by name. Arguments and errors as of ``read``."""

    def check(self, vocab_size: int) -> None:
        """Raises ``ModelError`` where tensors, config and the target do not fit each other."""
        self.check_fc()
        self.check_vocabulary(vocab_size)

    @property
    def taps(self) -> TapShape:
        """What the target's stages add up for it."""
        return TapShape(tuple(sorted(self.layer_ids)), self.config.hidden_size, None, False)

    def block(self, layer: int, dtype: torch.dtype) -> Tensor:
        """What the stream that enters a layer is multiplied by, [D, H]: columns of ``fc``."""
        place = self.layer_ids.index(layer)
        start = place * self.target_size
        return self.files.columns(self.names[FC], start, start + self.target_size).to(dtype).contiguous()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor, by the name used here; ``None`` where the file has none."""
        own = self.names.get(name)
        return None if own is None else self.files.shapes[own]

    def tensor(self, name: str) -> Tensor:
        return self.files.tensor(self.names[name])

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ``ModelError`` unless the file has it, of this shape."""
        if name not in self.names:
            raise self.lacks([name])
        if self.shape(name) != shape:
            raise self.files.wrong_shape(self.names[name], shape)

    def lacks(self, names: Sequence[str]) -> ModelError:
        return ModelError(
            f"{self.files.path} lacks {', '.join(names[:4])}; this is no {self.kind} head as its config.json describes "
            "it, or the download is incomplete"
        )

    def refuse_unknown(self, known: Set[str]) -> None:
        """Raises ``ModelError`` for a tensor that is none of these: nobody knows what it would have changed."""
        if unknown := sorted(own for name, own in self.names.items() if name not in known):
            raise ModelError(f"{self.files.path} has unknown tensors {', '.join(unknown[:4])}; {SUPPORTED}")

    def fill(self, head: nn.Module, known: Set[str], dtype: torch.dtype, device: torch.device | str) -> None:
        """Give a head without values those of the file. ``known``: tensors of the file that are no part of it.

        Raises ``ModelError`` for what is missing, unknown, or of another shape.
        """
        expected = head.state_dict()
        if missing := sorted(expected.keys() - self.names.keys()):
            raise self.lacks(missing)
        self.refuse_unknown(expected.keys() | known)
        for name, tensor in expected.items():
            self.require(name, tuple(tensor.shape))
        head.load_state_dict({name: self.tensor(name).to(device, dtype) for name in expected}, assign=True)

    def check_fc(self) -> None:
        """Raises ``ModelError`` unless ``fc`` reads as many layers as are named."""
        size, num = self.config.hidden_size, len(self.layer_ids)
        columns = (self.shape(FC) or (0, 0))[-1]
        if FC in self.names and columns != num * self.target_size and columns % self.target_size == 0:
            raise ModelError(
                f"{self.files.path}: {FC} reads {columns // self.target_size} layers of the target, but {num} are "
                f"named ({', '.join(map(str, self.layer_ids))}); give the right ones with draft_layers (--draft-layers)"
            )
        self.require(FC, (size, num * self.target_size))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ModelError`` for an lm_head, a table or an embedding that does not fit the target."""
        size, own = self.config.hidden_size, self.shape(HEAD)
        num = self.files.config.get("draft_vocab_size") or (own[0] if own else vocab_size)
        if not isinstance(num, int) or not 0 < num <= vocab_size:
            raise ModelError(
                f"the head in {self.files.directory} knows {shortened(repr(num), 20)} tokens, the target {vocab_size}; "
                "give a head that was trained for this target"
            )
        if own or num < vocab_size or size != self.target_size:  # else the target's serves
            self.require(HEAD, (num, size))
        if IDS in self.names or num < vocab_size:
            self.require(IDS, (num,))
        if EMBEDDING in self.names or size != self.target_size:
            self.require(EMBEDDING, (vocab_size, size))

    def token_ids(self, vocab_size: int) -> Tensor | None:
        """The target's tokens that the draft tokens stand for, int64 [N]; ``None``: all of them, in order.

        Raises ``ModelError`` for a table that is none.
        """
        if IDS not in self.names:
            return None
        offsets = self.tensor(IDS)
        num = len(offsets)
        problem = ""
        if offsets.is_floating_point() or offsets.dtype == torch.bool:
            problem = f"has numbers of type {offsets.dtype}"
        elif num < vocab_size and not offsets.any():
            problem = "is all zeros, so it was never filled in"
        else:
            ids = torch.arange(num) + offsets.long()
            if ids.min() < 0 or ids.max() >= vocab_size:
                problem = f"leads to tokens outside the target's vocabulary of {vocab_size}"
            elif len(ids.unique()) < num:
                problem = "leads to the same token twice"
            else:
                return None if num == vocab_size and not offsets.any() else ids
        raise ModelError(f"{self.files.path}: {IDS} {problem}; fetch the head again, or give one for this target")


def read_layers(
    files: DraftFiles, plain: Callable[[str], str], hidden_size: int, vocab_size: int, may_slide: bool = False
) -> tuple[dict[str, str], LlamaConfig | Qwen3Config]:
    """The names used here -> the file's, and the config of the head's layers. Sizes are the target's.

    ``plain``: a name of the file -> the one used here. ``may_slide``: attention over a window is known. Raises
    ``ModelError`` for what does not fit the target.
    """
    names = _names_of(files, plain)
    config = _layers_config(files, {name: files.shapes[own] for name, own in names.items()}, may_slide)
    check_fits(files.directory, config, vocab_size)
    _check_target_size(files, hidden_size)
    return names, config


def _names_of(files: DraftFiles, plain: Callable[[str], str]) -> dict[str, str]:
    """The names used here -> the file's. Raises ``ModelError`` where two of these mean the same."""
    names: dict[str, str] = {}
    for name in files.shapes:
        own = plain(name)
        if own in names:
            raise ModelError(f"{files.path} holds both {names[own]} and {name}, which mean the same; fetch it again")
        if not _IGNORED.fullmatch(own):
            names[own] = name
    return names


def _layers_config(
    files: DraftFiles, shapes: Mapping[str, tuple[int, ...]], may_slide: bool
) -> LlamaConfig | Qwen3Config:
    """Of the head's layers: as many as there are tensors of. Raises ``ModelError``."""
    found = sorted({int(match[1]) for match in map(_LAYER.match, shapes) if match})
    if found != list(range(len(found))) or not found:
        raise ModelError(f"{files.path} has tensors of the layers {found or 'none'}; a head's layers count from 0")
    values: Any = files.config
    if values.get(CONTAINER):
        values = values.get("transformer_layer_config")
        if not isinstance(values, dict):
            raise ModelError(f"{files.config_path} has no transformer_layer_config; fetch the file again")
    types = values.get("layer_types")
    values = {**values, "num_hidden_layers": len(found)}
    if isinstance(types, list):
        values["layer_types"] = types[: len(found)]
        if "sliding_attention" in types[: len(found)] and not may_slide:
            raise ModelError(f"{files.config_path}: the head's attention slides, which is not supported; {SUPPORTED}")
    config: LlamaConfig | Qwen3Config
    if f"{FIRST}self_attn.q_norm.weight" in shapes:
        config = layer_config(values, files.config_path, Qwen3Config)
    else:
        config = layer_config(values, files.config_path, LlamaConfig)
    take_head_dim(config, shapes.get(f"{FIRST}self_attn.q_proj.weight"))
    return config


def _check_target_size(files: DraftFiles, hidden_size: int) -> None:
    """Raises ``ModelError`` where the config says another width of the target."""
    said = files.config.get("target_hidden_size") or hidden_size
    if said != hidden_size:
        raise ModelError(
            f"the head in {files.directory} reads features of width {said}, the target's are {hidden_size} wide; "
            "give a head that was trained for this target"
        )
