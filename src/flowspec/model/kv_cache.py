"""The keys and values of one request in the layers of one stage, in the form that transformers' layers write to."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flowspec.model.slots import SlotTable

# The argument by which transformers' layers and models take a cache: from 5.24 on under the new name.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"


class KVCache(Cache):
    """Keys and values of one request in the layers of one stage, in the form that transformers' layers write to.

    The table decides which slot a row has. ``write_at`` names the slots of the next forward; each layer then calls
    ``update``. Tensors are ``[1, num_kv_heads, capacity, head_dim]``, made at a layer's first row and grown by
    doubling; dead slots are reused and never given back.
    """

    def __init__(self, first_layer: int, num_layers: int, root_id: int | None = None) -> None:
        """``first_layer`` is the model's index of the first of the ``num_layers`` layers."""
        super().__init__(layers=[])
        self.slots = SlotTable(root_id)
        self._first_layer = first_layer
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._rows = torch.empty(0, dtype=torch.long)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values) if tensor is not None)

    def write_at(self, slots: torch.Tensor) -> None:
        """Let the next forward write to ``slots``, LongTensor [n] on the device; a slot may be written again."""
        self._rows = slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by a layer: write its rows [1, num_kv_heads, n, head_dim]; return all slots below high water."""
        layer, capacity, end = layer_idx - self._first_layer, self.slots.capacity, self.slots.high_water
        keys = self._keys[layer] = _with_capacity(self._keys[layer], capacity, key_states)
        values = self._values[layer] = _with_capacity(self._values[layer], capacity, value_states)
        keys.index_copy_(2, self._rows, key_states)
        values.index_copy_(2, self._rows, value_states)
        return keys[:, :, :end], values[:, :, :end]


class JointCache(Cache):
    """Several requests' caches in one forward: the layers' linear parts run on all rows, attention on each one's own.

    ``update`` returns one tensor for each cache, which ``attention.slot_attention`` takes in the place of one.
    """

    def __init__(self, caches: Sequence[KVCache], num_rows: Sequence[int]) -> None:
        """``num_rows``: how many of the forward's rows belong to each cache, in their order; it knows their slots."""
        super().__init__(layers=[])
        self._caches = caches
        self._num_rows = list(num_rows)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        rows = zip(key_states.split(self._num_rows, dim=2), value_states.split(self._num_rows, dim=2), strict=True)
        pairs = [cache.update(*own, layer_idx) for cache, own in zip(self._caches, rows, strict=True)]
        return tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs)


def _with_capacity(tensor: torch.Tensor | None, capacity: int, like: torch.Tensor) -> torch.Tensor:
    if tensor is not None and tensor.shape[2] == capacity:
        return tensor
    # Zeros: attention multiplies the values it must not see by 0, and 0 * NaN would be NaN.
    grown = like.new_zeros(*like.shape[:2], capacity, like.shape[3])
    if tensor is not None:
        grown[:, :, : tensor.shape[2]] = tensor
    return grown
