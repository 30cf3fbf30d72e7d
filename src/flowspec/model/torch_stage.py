"""A stage of transformers' own modules, in torch.

The first stage has the embedding, the last one the final norm; no stage has the lm_head, which is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowspec.core import DType, LayerRange
from flowspec.model.families import embedding_scale
from flowspec.model.forward_rows import ForwardRows, LayersStage, rotations_of
from flowspec.model.kv_cache import CACHE_ARGUMENT, KVCache
from flowspec.model.source import TensorSource
from flowspec.model.stage import Part, Watch
from flowspec.model.stage_weights import checked_config, load_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class TorchStage(LayersStage):
    """On any device that torch has."""

    def __init__(self, config: PreTrainedConfig, layers: LayerRange, modules: nn.ModuleDict) -> None:
        """``modules``: as ``stage_weights.load_modules`` makes them. Use ``load`` to make a stage."""
        weight = next(modules.parameters())
        super().__init__(config, layers, weight.dtype)
        self.device = weight.device
        self.slot_bytes = self.attention.slot_bytes(weight.dtype)
        self.weights_bytes = sum(weight.nbytes for weight in modules.parameters())
        self._layers = list(modules["layers"].children())
        self._embedding = modules["embed_tokens"] if self.is_first else None
        # Some models multiply by it themselves, others in their embedding.
        self._embedding_scale = 1.0 if hasattr(self._embedding, "embed_scale") else embedding_scale(config)
        self._norm = modules["norm"] if self.is_last else None
        self._rotary = modules["rotary_emb"]

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
    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[Tensor | None]:
        """With a pause after each layer but the last."""
        if not len(parts[0].slots):
            yield torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)
            return
        rows = ForwardRows.of(parts, self.attention, self.device)
        hidden = rows.inputs.to(self.dtype) if self._embedding is None else self._embed(rows.inputs)
        hidden = hidden[None]
        rotations = rotations_of(self._rotary, hidden, rows.positions, self.attention.types)
        for index, (layer, layer_type) in enumerate(zip(self._layers, self.attention.types, strict=True)):
            if index:
                yield None
            if watch is not None:
                watch(self.layers.start + index, hidden[0])
            hidden = layer(
                hidden,
                attention_mask=rows.masks[layer_type],
                position_ids=rows.positions,
                use_cache=True,
                position_embeddings=rotations[layer_type],
                **{CACHE_ARGUMENT: rows.cache},
            )
        if watch is not None and self.is_last:
            watch(self.layers.end, hidden[0])
        yield (hidden if self._norm is None else self._norm(hidden))[0]

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self._embedding is not None, "the first stage has it"
        rows = self._embedding(token_ids)
        return rows if self._embedding_scale == 1.0 else rows * self._embedding_scale
