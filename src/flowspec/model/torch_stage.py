"""A stage of transformers' own modules, in torch.

The first stage has the embedding, the last one the final norm; no stage has the lm_head, which is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowspec.core import DType, LayerRange
from flowspec.model.families import FAMILIES, FULL, SLIDING
from flowspec.model.kv_cache import CACHE_ARGUMENT, JointCache, KVCache
from flowspec.model.slots import SlotTable
from flowspec.model.source import TensorSource
from flowspec.model.stage import Part
from flowspec.model.stage_weights import checked_config, load_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class TorchStage:
    """The layers ``[start, end)`` of a model on one device. It keeps nothing between segments but its weights."""

    def __init__(self, config: PreTrainedConfig, layers: LayerRange, modules: nn.ModuleDict) -> None:
        """``modules``: as ``stage_weights.load_modules`` makes them. Use ``load`` to make a stage."""
        types = FAMILIES[config.model_type].layer_types(config)
        self.layers = layers
        self.hidden_size: int = config.hidden_size
        self.is_first = layers.start == 0
        self.is_last = layers.end == config.num_hidden_layers
        self.weights_bytes = sum(weight.nbytes for weight in modules.parameters())
        self._layers = list(modules["layers"].children())
        self._embedding = modules["embed_tokens"] if self.is_first else None
        self._norm = modules["norm"] if self.is_last else None
        self._rotary = modules["rotary_emb"]
        self._types = types[layers.start : layers.end]
        self._window: int | None = config.sliding_window if SLIDING in self._types else None
        weight = next(modules.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_kept = 2 * len(layers) * config.num_key_value_heads * head_dim  # keys and values
        self.slot_bytes = num_kept * self.dtype.itemsize

    @classmethod
    def load(
        cls,
        source: TensorSource,
        layers: LayerRange,
        dtype: DType,
        device: str,
        progress: Callable[[float], None] | None = None,
    ) -> TorchStage:
        """Read the tensors of these layers and no others; ``progress`` is told the fraction that is done.

        Raises ``ModelError`` if the source has no such layers, cannot be cut, or does not fit its own config.
        """
        config = checked_config(source, layers)
        return cls(config, layers, load_modules(source, config, layers, dtype, device, progress))

    def open_cache(self, root_id: int | None = None) -> KVCache:
        """An empty cache for one request."""
        return KVCache(self.layers.start, len(self.layers), root_id)

    @torch.inference_mode()
    def steps(self, parts: Sequence[Part]) -> Generator[Tensor | None]:
        """With a pause after each layer but the last."""
        if not len(parts[0].slots):
            yield torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)
            return
        positions = np.concatenate([part.cache.slots.positions[part.slots] for part in parts])
        positions = torch.from_numpy(positions)[None].to(self.device)
        all_masks = [self._masks(part) for part in parts]
        for part in parts:
            part.cache.write_at(torch.from_numpy(part.slots).to(self.device))
        cache, masks = parts[0].cache, all_masks[0]
        if len(parts) > 1:
            cache = JointCache([part.cache for part in parts], [len(part.slots) for part in parts])
            masks = {name: tuple(masks[name] for masks in all_masks) for name in masks}
        hidden = self._embed(torch.cat([part.inputs for part in parts]))[None]
        rotation = self._rotary(hidden, positions)
        for index, (layer, layer_type) in enumerate(zip(self._layers, self._types, strict=True)):
            if index:
                yield None
            hidden = layer(
                hidden,
                attention_mask=masks[layer_type],
                position_ids=positions,
                use_cache=True,
                position_embeddings=rotation,
                **{CACHE_ARGUMENT: cache},
            )
        yield (hidden if self._norm is None else self._norm(hidden))[0]

    def _embed(self, inputs: Tensor) -> Tensor:
        if self._embedding is None:
            return inputs.to(self.device, self.dtype)
        return self._embedding(inputs.to(self.device))

    def _masks(self, part: Part) -> dict[str, Any]:
        """Boolean masks [1, 1, n, high_water] by layer type; a window counts positions, since slots have no order."""
        table: SlotTable = part.cache.slots
        masks = {FULL: table.rows_mask(part.slots)}
        if self._window is not None:
            distances = table.positions[part.slots][:, None] - table.positions[: table.high_water]
            masks[SLIDING] = masks[FULL] & (distances < self._window)
        return {name: torch.from_numpy(rows)[None, None].to(self.device) for name, rows in masks.items()}
