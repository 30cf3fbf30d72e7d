"""Attention of a few queries over a long cache that several heads share, as transformers calls it.

Its own way repeats keys and values for every head of a group; here the group's queries are rows of one product. That is
what generating many rows at a time spends its time on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_NAME = "grouped"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """[B, T, heads, D] of ``query`` [B, heads, T, D] over keys [B, kv heads, L, D], with a mask [B, 1, T, L]."""
    batch, num_heads, length, size = query.shape
    num_groups = key.shape[1]
    rows = query.reshape(batch, num_groups, -1, size)  # of all heads of a group
    mask = attention_mask[:, :, None].expand(-1, -1, num_heads // num_groups, -1, -1).flatten(2, 3)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, num_heads, length, -1).transpose(1, 2), None


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*arguments, **(options | {"allow_is_causal_skip": False}))


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _mask)


@contextmanager
def grouped_attention(model: Any) -> Iterator[None]:
    """Within it, the model's layers attend so."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
