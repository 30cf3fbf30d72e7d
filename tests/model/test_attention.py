"""Our attention function against torch's own."""

from __future__ import annotations

import pytest
import torch

from flowspec.model.attention import slot_attention


@pytest.mark.parametrize("num_rows", [1, 2, 9])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_grouped_attention_equals_repeated_keys(num_rows: int, num_kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(num_rows)
    query = torch.randn(3, num_rows, 6, 8, generator=draw).transpose(1, 2)
    key, value = (torch.randn(3, num_kv_heads, 12, 8, generator=draw) for _ in range(2))
    mask = torch.rand(3, 1, num_rows, 12, generator=draw) < 0.5
    mask[..., 0] = True
    output, _ = slot_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    repeated = (tensor.repeat_interleave(6 // num_kv_heads, dim=1) for tensor in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(output, wanted.transpose(1, 2))
