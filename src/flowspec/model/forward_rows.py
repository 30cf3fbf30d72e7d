"""What stages of a transformer's layers share, whatever runs these: their sizes, and the rows of one forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.model.families import FAMILIES, FULL, SLIDING
from flowspec.model.kv_cache import JointCache, KVCache
from flowspec.model.slots import SlotTable
from flowspec.model.stage import Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from flowspec.core import LayerRange


@dataclass(frozen=True)
class AttentionShape:
    """What the attentions of a stage's layers look like."""

    types: list[str]  # of each layer
    window: int | None  # of sliding ones, in positions
    num_kv_heads: int
    group: int  # query heads that share a key head
    head_dim: int

    @property
    def num_heads(self) -> int:
        """Of queries."""
        return self.num_kv_heads * self.group

    @classmethod
    def of(cls, config: PreTrainedConfig, layers: LayerRange) -> AttentionShape:
        types = FAMILIES[config.model_type].layer_types(config)[layers.start : layers.end]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        window = config.sliding_window if SLIDING in types else None
        group = config.num_attention_heads // config.num_key_value_heads
        return cls(types, window, config.num_key_value_heads, group, head_dim)

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Of one row's keys and values in all layers."""
        return 2 * len(self.types) * self.num_kv_heads * self.head_dim * dtype.itemsize


class LayersStage:
    """The layers ``[start, end)`` of a model. It keeps nothing between segments but its weights."""

    def __init__(self, config: PreTrainedConfig, layers: LayerRange, dtype: torch.dtype) -> None:
        """``dtype``: of hidden states."""
        self.layers = layers
        self.hidden_size: int = config.hidden_size
        self.is_first = layers.start == 0
        self.is_last = layers.end == config.num_hidden_layers
        self.dtype = dtype
        self.attention = AttentionShape.of(config, layers)


@dataclass(frozen=True)
class ForwardRows:
    """The rows of one request or of several, whose caches they are written to."""

    inputs: Tensor  # token ids [n] or hidden states [n, H]
    positions: Tensor  # [1, n]
    masks: dict[str, Any]  # by type of layer: boolean [1, 1, group * n, high_water], or one for each request
    cache: KVCache | JointCache

    @classmethod
    def of(cls, parts: Sequence[Part], shape: AttentionShape, device: torch.device) -> ForwardRows:
        """Not of a part without rows."""
        positions = np.concatenate([part.cache.slots.positions[part.slots] for part in parts])
        all_masks = [
            {name: _by_heads(mask, shape.group, device) for name, mask in masks_of(part, shape.window).items()}
            for part in parts
        ]
        for part in parts:
            part.cache.write_at(torch.from_numpy(part.slots).to(device))
        cache, masks = parts[0].cache, all_masks[0]
        if len(parts) > 1:
            cache = JointCache([part.cache for part in parts], [len(part.slots) for part in parts])
            masks = {name: tuple(masks[name] for masks in all_masks) for name in masks}
        inputs = torch.cat([part.inputs for part in parts])
        return cls(inputs.to(device), torch.from_numpy(positions)[None].to(device), masks, cache)


def rotations_of(
    rotary: Any, like: Tensor, positions: Tensor, types: Iterable[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Cosines and sines [1, n, d] by type of layer, of ``like``'s dtype. ``positions`` [1, n].

    ``rotary``: transformers' module, of which some families have one for each type of layer in one.
    """
    if hasattr(rotary, "layer_types"):
        return {kind: rotary(like, positions, kind) for kind in set(types)}
    rotation: tuple[Tensor, Tensor] = rotary(like, positions)
    return dict.fromkeys(types, rotation)


def frequencies_of(rotary: Any, types: Iterable[str]) -> dict[str, tuple[NDArray[np.float32], np.float32]]:
    """By type of layer: by what positions are multiplied [r], and cosines and sines then. ``rotary``: as above."""
    prefixes = {kind: f"{kind}_" if hasattr(rotary, "layer_types") else "" for kind in types}
    return {
        kind: (
            getattr(rotary, f"{prefix}inv_freq").float().numpy(),
            np.float32(getattr(rotary, f"{prefix}attention_scaling")),
        )
        for kind, prefix in prefixes.items()
    }


def masks_of(part: Part, window: int | None) -> dict[str, NDArray[np.bool_]]:
    """By type of layer [n, high_water]; a window counts positions, since slots have no order."""
    table: SlotTable = part.cache.slots
    masks = {FULL: table.rows_mask(part.slots)}
    if window is not None:
        distances = table.positions[part.slots][:, None] - table.positions[: table.high_water]
        masks[SLIDING] = masks[FULL] & (distances < window)
    return masks


def _by_heads(mask: NDArray[np.bool_], group: int, device: torch.device) -> Tensor:
    """[n, slots] -> [1, 1, group * n, slots], as ``attention.attend`` takes it."""
    return torch.from_numpy(mask).to(device).repeat(1, 1, group, 1)
