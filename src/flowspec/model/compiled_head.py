"""A draft head's matrices on compiled kernels: a pass over ten rows then costs little more than one over a single row.

Everything else of the head stays torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowspec.model.compiled_stage import CompiledLinear
from flowspec.model.draft_head import replace_linears
from flowspec.model.packed import FloatWeight, Precision, Weight, pack


class KernelLinear(nn.Module):
    """A linear layer; rows come in and go out in any float dtype."""

    bias: Tensor | None  # [N]

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        """``weight`` [N, K]."""
        super().__init__()
        self._linear = CompiledLinear(weight)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, rows: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        product = self._linear(rows.reshape(-1, rows.shape[-1])).to(rows.dtype)
        return (product if self.bias is None else product + self.bias).view(*rows.shape[:-1], -1)


def compile_head(head: nn.Module, precision: Precision) -> None:
    """Replace ``fc`` and all projections of a loaded head; in floats they stay as they are."""
    replace_linears(head, lambda linear: KernelLinear(weight_of(linear.weight, precision), linear.bias))


def weight_of(matrix: Tensor, precision: Precision) -> Weight:
    """A float matrix [N, K], rounded to bits, or as it is, in the narrowest type that holds it."""
    if not isinstance(precision, str):
        return pack(matrix, precision)
    matrix = matrix.detach()
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(matrix.to(dtype).to(matrix.dtype), matrix):
            return FloatWeight(matrix.to(dtype))
    return FloatWeight(matrix)
