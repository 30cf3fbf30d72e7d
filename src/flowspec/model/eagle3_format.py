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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspec.core import TapShape
from flowspec.errors import ModelError, shortened
from flowspec.model.draft_files import DraftFiles
from flowspec.model.eagle3_layers import find_layer_ids
from flowspec.model.head_kind import plain_name
from flowspec.model.head_tensors import CONTAINER, HeadTensors, TargetSizes, read_layers

FC_BIAS, INPUT_NORM = "fc.bias", "input_norm.weight"
MASK_HIDDEN = "mask_hidden"  # of P-EAGLE
_FC_NORM = re.compile(r"fc_norm\.(\d+)\.weight")


@dataclass(frozen=True)
class Eagle3Format(HeadTensors):
    """An EAGLE-3 checkpoint that has been looked through."""

    kind = "EAGLE-3"

    norm_before_residual: bool  # the first layer's residual is the normed feature
    norm_output: bool  # what is fed back has passed ``norm``
    has_fc_norm: bool

    @classmethod
    def _fields(cls, files: DraftFiles, target: TargetSizes, draft_layers: Sequence[int] | None) -> dict[str, Any]:
        names, config = read_layers(files, plain_name, target.hidden_size, target.vocab_size)
        return {
            "files": files,
            "config": config,
            "names": names,
            "layer_ids": find_layer_ids(files, target.num_layers, draft_layers),
            "target_size": target.hidden_size,
            "norm_before_residual": _residual_switch(files),
            "norm_output": _switch(files, "norm_output", False),
            "has_fc_norm": _switch(files, "fc_norm", any(_FC_NORM.fullmatch(name) for name in names)),
        }

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
        """With the weight of its norm, if it has one."""
        place = self.layer_ids.index(layer)
        if not (self.has_fc_norm or self.has_input_norm):
            return super().block(layer, dtype)
        start, end = place * self.target_size, (place + 1) * self.target_size
        norm = self.tensor(f"fc_norm.{place}.weight") if self.has_fc_norm else self.tensor(INPUT_NORM)[start:end]
        return (super().block(layer, torch.float32) * norm.float()).to(dtype).contiguous()

    def check(self, vocab_size: int) -> None:
        """Raises ``ModelError`` where tensors, switches and the target do not fit each other."""
        self.check_fc()
        norms = [name for name in self.names if _FC_NORM.fullmatch(name)]
        size, num = self.config.hidden_size, len(self.layer_ids)
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
        self.check_vocabulary(vocab_size)

    def _contradicts(self, switch: str, name: str, is_there: bool) -> ModelError:
        told = "has" if is_there else "lacks"
        return ModelError(
            f"{self.files.path} {told} {name}, and {switch} in config.json says otherwise; fetch both again from one "
            "place"
        )


def _switch(files: DraftFiles, name: str, default: bool) -> bool:
    nested = files.config.get("eagle_config")
    value = files.config.get(name, nested.get(name) if isinstance(nested, dict) else None)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{files.config_path}: {name} is {shortened(repr(value), 40)}; it must be true or false")
    return default if value is None else value


def _residual_switch(files: DraftFiles) -> bool:
    """EAGLE's own code knows it not, and has the feature itself as residual; readers of speculators' files differ."""
    name = "norm_before_residual"
    if files.config.get(CONTAINER) and files.config.get(name) is None:
        raise ModelError(
            f"{files.config_path} does not say {name}, and programs differ in what that means; add it as it was when "
            "the head was trained (true or false)"
        )
    return _switch(files, name, False)
