"""Keys and values follow the slot table, and transformers' layers write them."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch

from flowspec.model.kv_cache import CACHE_ARGUMENT, KVCache
from tiny_models import FAMILIES, make_model

ROOT = 100


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None].expand(1, 2, len(values), 4)


def test_the_cache_writes_rows_into_their_slots_and_returns_those_below_high_water() -> None:
    cache = KVCache(first_layer=3, num_layers=2, root_id=ROOT)
    cache.slots.append_prefix(range(5))
    cache.write_at(torch.tensor([4, 0]))
    keys, values = cache.update(rows(1, 2), rows(3, 4), layer_idx=4)
    assert keys.shape == values.shape == (1, 2, 5, 4)
    assert keys[0, 1, :, 3].tolist() == [2, 0, 0, 0, 1]
    assert values[0, 0, :, 0].tolist() == [4, 0, 0, 0, 3]
    cache.write_at(torch.tensor([4]))
    keys, _ = cache.update(rows(7), rows(7), layer_idx=4)
    assert keys[0, 1, :, 3].tolist() == [2, 0, 0, 0, 7]
    other, _ = cache.update(rows(9), rows(9), layer_idx=3)
    assert other[0, 0, :, 0].tolist() == [0, 0, 0, 0, 9]


def test_the_cache_grows_with_the_table_and_keeps_its_rows() -> None:
    cache = KVCache(first_layer=0, num_layers=1)
    sizes: list[int] = []
    for step in range(5):
        slots = cache.slots.append_prefix(range(step * 150, (step + 1) * 150))
        cache.write_at(torch.from_numpy(slots))
        numbers = rows(*slots.tolist())
        keys, values = cache.update(numbers, -numbers, layer_idx=0)
        expected = torch.arange((step + 1) * 150)
        assert torch.equal(keys[0, 0, :, 0], expected.float())
        assert torch.equal(values[0, 1, :, 1], -expected.float())
        sizes.append(cache.num_bytes)
    assert cache.slots.capacity == 1024
    assert sizes[-1] == 2 * 1024 * 2 * 4 * 4
    assert all(later % earlier == 0 for earlier, later in pairwise(sizes))


def test_slots_that_were_never_written_hold_no_nan() -> None:
    cache = KVCache(first_layer=0, num_layers=1)
    cache.slots.append_prefix(range(200))
    cache.write_at(torch.tensor([199]))
    keys, values = cache.update(rows(1), rows(1), layer_idx=0)
    assert not keys[:, :, :199].any()
    assert not values[:, :, :199].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_models_take_a_cache_by_this_name(family: str) -> None:
    """A name that they do not know would be swallowed by their ``**kwargs``, and the cache never be used."""
    model: Any = make_model(family)
    for module in (model, model.model, model.model.layers[0], model.model.layers[0].self_attn):
        assert CACHE_ARGUMENT in inspect.signature(module.forward).parameters
