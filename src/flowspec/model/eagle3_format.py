"""EAGLE-3's published checkpoints (arXiv 2503.01840) and those of 3.1 (arXiv 2605.09992), in all their dialects.

Tensors, by the names used here: ``fc.weight`` [D, n H] (``fc.bias``); ``layers.0.*``, whose projections read 2 D, with
``input_layernorm`` for the embedding and ``hidden_norm`` for the feature; ordinary ``layers.1.*`` and so on, if any;
``norm.weight``; ``lm_head.weight`` [N, D] over a reduced vocabulary with ``d2t`` [N], where draft token i is the
target's token ``i + d2t[i]``; ``embed_tokens.weight`` [V, D] where it is not the target's. ``t2d`` is of use in
training alone. 3.1 adds a norm of each stream, ``fc_norm.i.weight`` [H]; ``norm_before_fc`` means one of all, with
``input_norm.weight`` [n H].

| dialect | names of the layer | sizes and switches | tapped layers |
|---|---|---|---|
| EAGLE's own (yuhuili), AngelSlim | ``midlayer.*`` | top of the config | not said |
| SpecForge | ``midlayer.*`` | top of the config | ``eagle_config`` |
| speculators | ``layers.0.*`` | ``transformer_layer_config``, and the top | ``eagle_aux_hidden_state_layer_ids`` |

The tensors decide what the head has: biases, norms of queries and keys, how many layers, how large an attention head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from flowspec.core import TapShape
from flowspec.errors import ModelError, shortened
from flowspec.model.draft_files import DraftFiles, check_fits, layer_config, take_head_dim
from flowspec.model.eagle3_layers import find_layer_ids

FC, FC_BIAS, INPUT_NORM = "fc.weight", "fc.bias", "input_norm.weight"
EMBEDDING, HEAD, IDS = "embed_tokens.weight", "lm_head.weight", "d2t"
FIRST = "layers.0."
_IGNORED = re.compile(r"t2d|.*rotary_emb\.inv_freq|verifier_(norm|lm_head)\.weight")
_LAYER = re.compile(r"layers\.(\d+)\.")
_FC_NORM = re.compile(r"fc_norm\.(\d+)\.weight")
_CONTAINER = "speculators_model_type"
_SUPPORTED = "give an EAGLE-1, EAGLE-2 or EAGLE-3 head, or 'ngram'"

Kind = Literal["eagle", "eagle3"]


def kind_of(files: DraftFiles) -> Kind:
    """By the container, or by the tensors. Raises ``ModelError`` for a draft of another kind."""
    container = files.config.get(_CONTAINER)
    names = {_plain(name) for name in files.shapes}
    other = container if container != "eagle3" else None
    if "mask_hidden" in names or "mask_embedding" in names:
        other = "peagle"
    elif any(name.startswith("markov_head.") for name in names):
        other = "dspark"
    elif "hidden_norm.weight" in names or "dflash_config" in files.config:
        other = "dflash"
    if other is not None:
        raise ModelError(
            f"{files.directory} holds a draft of the kind {shortened(str(other), 40)!r}, which is not supported; "
            f"{_SUPPORTED}"
        )
    fc = files.shapes.get(FC, ())
    is_wide = len(fc) == 2 and fc[1] >= 3 * fc[0] > 0  # EAGLE-1's reads one feature and one embedding
    marks = {IDS, "t2d", f"{FIRST}hidden_norm.weight"}
    return "eagle3" if container == "eagle3" or is_wide or names & marks else "eagle"


def _plain(name: str) -> str:
    """A tensor's name in any dialect -> the one used here."""
    name = name.removeprefix("model.")
    return FIRST + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


@dataclass(frozen=True)
class Eagle3Format:
    """A checkpoint that has been looked through, and fits its target: names and shapes, but no tensor is read yet."""

    files: DraftFiles
    config: LlamaConfig | Qwen3Config  # of the head's layers
    names: Mapping[str, str]  # the names used here -> the file's
    layer_ids: tuple[int, ...]  # of the target, in the order of fc's blocks; as in ``TapShape.layers``
    target_size: int  # H
    norm_before_residual: bool  # the first layer's residual is the normed feature
    norm_output: bool  # what is fed back has passed ``norm``
    has_fc_norm: bool

    @classmethod
    def read(
        cls,
        files: DraftFiles,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        draft_layers: Sequence[int] | None = None,
    ) -> Eagle3Format:
        """Sizes are the target's; ``draft_layers`` overrule what the config says of layers.

        Raises ``ModelError`` for a checkpoint that lacks something, contradicts itself, or is of another target.
        """
        names = _names_of(files)
        shapes = {name: files.shapes[own] for name, own in names.items()}
        config = _layers_config(files, shapes)
        check_fits(files.directory, config, vocab_size)
        said = files.config.get("target_hidden_size") or hidden_size
        if said != hidden_size:
            raise ModelError(
                f"the head in {files.directory} reads features of width {said}, the target's are {hidden_size} wide; "
                "give a head that was trained for this target"
            )
        layer_ids = find_layer_ids(files, num_layers, draft_layers)
        norms = sorted(int(match[1]) for match in map(_FC_NORM.fullmatch, names) if match)
        found = cls(
            files,
            config,
            names,
            layer_ids,
            hidden_size,
            _residual_switch(files),
            _switch(files, "norm_output", False),
            _switch(files, "fc_norm", bool(norms)),
        )
        found._check_fc(norms)
        found._check_vocabulary(vocab_size)
        return found

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
            f"{self.files.path} lacks {', '.join(names[:4])}; this is no EAGLE-3 head as its config.json describes it, "
            "or the download is incomplete"
        )

    def refuse_unknown(self, known: Set[str]) -> None:
        """Raises ``ModelError`` for a tensor that is none of these: nobody knows what it would have changed."""
        if unknown := sorted(own for name, own in self.names.items() if name not in known):
            raise ModelError(f"{self.files.path} has unknown tensors {', '.join(unknown[:4])}; {_SUPPORTED}")

    @property
    def has_input_norm(self) -> bool:
        return INPUT_NORM in self.names

    @property
    def taps(self) -> TapShape:
        """What the target's stages add up for it."""
        width = self.config.hidden_size + self.has_input_norm
        eps = self.config.rms_norm_eps if self.has_fc_norm else None
        return TapShape(tuple(sorted(self.layer_ids)), width, eps, self.has_input_norm)

    def block(self, layer: int, dtype: torch.dtype) -> Tensor:
        """What the stream that enters a layer is multiplied by, [D, H]: columns of ``fc``, with its norm's weight."""
        place = self.layer_ids.index(layer)
        start, end = place * self.target_size, (place + 1) * self.target_size
        block = self.files.columns(self.names[FC], start, end)
        if self.has_fc_norm:
            block = block.float() * self.tensor(f"fc_norm.{place}.weight").float()
        elif self.has_input_norm:
            block = block.float() * self.tensor(INPUT_NORM)[start:end].float()
        return block.to(dtype).contiguous()

    def _check_fc(self, norms: Sequence[int]) -> None:
        size, num = self.config.hidden_size, len(self.layer_ids)
        columns = (self.shape(FC) or (0, 0))[-1]
        if FC in self.names and columns != num * self.target_size and columns % self.target_size == 0:
            raise ModelError(
                f"{self.files.path}: {FC} reads {columns // self.target_size} layers of the target, but {num} are "
                f"named ({', '.join(map(str, self.layer_ids))}); give the right ones with draft_layers (--draft-layers)"
            )
        self.require(FC, (size, num * self.target_size))
        if FC_BIAS in self.names:
            self.require(FC_BIAS, (size,))
        if self.has_fc_norm and (self.has_input_norm or _switch(self.files, "norm_before_fc", False)):
            raise ModelError(f"{self.files.path} has both fc_norm and norm_before_fc, which exclude each other")
        if _switch(self.files, "norm_before_fc", self.has_input_norm) != self.has_input_norm:
            raise self._contradicts("norm_before_fc", INPUT_NORM, self.has_input_norm)
        if self.has_input_norm:
            self.require(INPUT_NORM, (num * self.target_size,))
        if bool(norms) != self.has_fc_norm:
            raise self._contradicts("fc_norm", "fc_norm.0.weight", bool(norms))
        for place in range(num) if self.has_fc_norm else ():
            self.require(f"fc_norm.{place}.weight", (self.target_size,))

    def _contradicts(self, switch: str, name: str, is_there: bool) -> ModelError:
        told = "has" if is_there else "lacks"
        return ModelError(
            f"{self.files.path} {told} {name}, and {switch} in config.json says otherwise; fetch both again from one "
            "place"
        )

    def _check_vocabulary(self, vocab_size: int) -> None:
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


def _names_of(files: DraftFiles) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in files.shapes:
        plain = _plain(name)
        if plain in names:
            raise ModelError(f"{files.path} holds both {names[plain]} and {name}, which mean the same; fetch it again")
        if not _IGNORED.fullmatch(plain):
            names[plain] = name
    return names


def _layers_config(files: DraftFiles, shapes: Mapping[str, tuple[int, ...]]) -> LlamaConfig | Qwen3Config:
    """Of the head's layers: as many as there are tensors of."""
    found = sorted({int(match[1]) for match in map(_LAYER.match, shapes) if match})
    if found != list(range(len(found))) or not found:
        raise ModelError(f"{files.path} has tensors of the layers {found or 'none'}; a head's layers count from 0")
    values: Any = files.config
    if values.get(_CONTAINER):
        values = values.get("transformer_layer_config")
        if not isinstance(values, dict):
            raise ModelError(f"{files.config_path} has no transformer_layer_config; fetch the file again")
    types = values.get("layer_types")
    values = {**values, "num_hidden_layers": len(found)}
    if isinstance(types, list):
        values["layer_types"] = types[: len(found)]
        if "sliding_attention" in types[: len(found)]:
            raise ModelError(f"{files.config_path}: the head's attention slides, which is not supported; {_SUPPORTED}")
    config: LlamaConfig | Qwen3Config
    if f"{FIRST}self_attn.q_norm.weight" in shapes:
        config = layer_config(values, files.config_path, Qwen3Config)
    else:
        config = layer_config(values, files.config_path, LlamaConfig)
    take_head_dim(config, shapes.get(f"{FIRST}self_attn.q_proj.weight"))
    return config


def _switch(files: DraftFiles, name: str, default: bool) -> bool:
    nested = files.config.get("eagle_config")
    value = files.config.get(name, nested.get(name) if isinstance(nested, dict) else None)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{files.config_path}: {name} is {shortened(repr(value), 40)}; it must be true or false")
    return default if value is None else value


def _residual_switch(files: DraftFiles) -> bool:
    """EAGLE's own code knows it not, and has the feature itself as residual; readers of speculators' files differ."""
    name = "norm_before_residual"
    if files.config.get(_CONTAINER) and files.config.get(name) is None:
        raise ModelError(
            f"{files.config_path} does not say {name}, and programs differ in what that means; add it as it was when "
            "the head was trained (true or false)"
        )
    return _switch(files, name, False)
