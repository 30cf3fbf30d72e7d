"""What a stage adds to the features of a draft that reads several of the target's layers, as EAGLE-3 does.

The first thing such a draft does is linear, ``fc([h_a; h_b; h_c])``: each stage multiplies the streams that it has by
their own block of ``fc`` and adds to one vector that travels with the row. Sums are made in the layers' order, and
rounded to the stage's dtype after each addition, so that no partition changes a bit of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from flowspec.core import TapShape


class Linear(Protocol):
    """A block of ``fc``, however it is computed."""

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, H] -> [n, D]."""
        ...


class TorchLinear:
    """In floats, on a torch device."""

    def __init__(self, weight: Tensor, device: torch.device | str) -> None:
        """``weight`` [D, H]."""
        self._weight = weight.to(device)

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows.to(self._weight.device, self._weight.dtype), self._weight)


class Taps:
    """Of one stage: the blocks of the layers that it has."""

    def __init__(self, shape: TapShape, blocks: Mapping[int, Linear], dtype: torch.dtype, is_begun: bool) -> None:
        """``blocks``: by layer, those of ``TapShape.of_stage``, or none. ``dtype``: of sums.

        ``is_begun``: stages before this one have added something.
        """
        self.shape = shape
        self.dtype = dtype
        self.is_begun = is_begun
        self.num_blocks = len(blocks)
        self._blocks = blocks

    def share(self, layer: int, rows: Tensor) -> Tensor | None:
        """What the rows [n, H] of the stream that enters a layer add, [n, width]; ``None``: nothing."""
        block = self._blocks.get(layer)
        if block is None:
            return None
        shape = self.shape
        if shape.norm_eps is not None:
            rows = (rows.float() * torch.rsqrt(_mean_square(rows) + shape.norm_eps)).to(rows.dtype)
        share = block(rows).to(self.dtype)
        if shape.has_squares:
            mean = _mean_square(rows) / len(shape.layers)
            share = torch.cat((share, mean.to(share.device, self.dtype)), dim=-1)
        return share


def _mean_square(rows: Tensor) -> Tensor:
    """float32 [n, 1] of [n, H]."""
    return rows.float().square().mean(-1, keepdim=True)


class TapSum:
    """The running sum of one forward's rows."""

    def __init__(self, taps: Taps, before: Tensor | None) -> None:
        """``before`` [n, width]: what the stages before have added; ``None``: nothing."""
        self.total = before
        self._taps = taps

    def __call__(self, layer: int, rows: Tensor) -> None:
        """A stage has the stream [n, H] that enters a layer."""
        share = self._taps.share(layer, rows)
        if share is not None:
            self.total = share if self.total is None else self.total.to(share.device) + share
