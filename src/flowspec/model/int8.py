"""int8 weights for the draft head and its logits: half the bytes of bfloat16 to read. Knows nothing of verification.

Only weights are quantised: symmetric, one scale for each output row. Products are made in bfloat16 whatever the head's
dtype is, since torch's kernel for int8 weights is vectorised for no other one on x86; the rest of the head stays as it
is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowspec.errors import UsageError
from flowspec.model.draft_head import replace_linears

_DTYPE = torch.bfloat16
_BLOCK = 16  # columns that the kernel takes at a time; beyond the last whole block it reads other memory
_LEVELS = 126.5  # 127, less what rounding a scale to bfloat16 may cost
_CHUNK = 4096  # rows


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; rows come in and go out in any float dtype."""

    weight: Tensor  # int8 [N, K]
    scales: Tensor  # bfloat16 [N]
    bias: Tensor | None  # [N]

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """``weight`` [N, K]. Raises ``UsageError`` where torch has no kernel for it."""
        super().__init__()
        quantised, scales = quantize_rows(weight)
        _check_kernel(quantised, scales)
        self.register_buffer("weight", quantised)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, rows: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        flat = rows.reshape(-1, rows.shape[-1]).to(_DTYPE)
        product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scales).to(rows.dtype)
        return (product if self.bias is None else product + self.bias).view(*rows.shape[:-1], -1)


class Int8TargetHead:
    """As ``TargetHead``, for drafting only: a copy of the lm_head in int8."""

    def __init__(self, weight: Tensor) -> None:
        """``weight`` [V, H]. Raises ``UsageError`` as ``Int8Linear`` does."""
        self._linear = Int8Linear(weight)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        return self._linear(hidden.to(self._linear.weight.device))


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and bfloat16 scales [N]; their product is at most half a scale from ``weight`` [N, K] anywhere."""
    largest = weight.detach().abs().amax(dim=1).float()
    scales = (largest / _LEVELS).to(_DTYPE)
    divisors = torch.where(scales > 0, scales, 1).float()[:, None]
    # A few rows at a time: a large vocabulary's matrix in float32 may not fit beside its original.
    parts = zip(weight.detach().split(_CHUNK), divisors.split(_CHUNK), strict=True)
    return torch.cat([(rows / divisor).round_().to(torch.int8) for rows, divisor in parts]), scales


def can_quantize(head: nn.Module) -> bool:
    """Whether ``quantize_head`` would do it."""
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    try:
        for linear in linears:
            _check_kernel(*quantize_rows(linear.weight[:_BLOCK]))
    except UsageError:
        return False
    return True


def quantize_head(head: nn.Module) -> None:
    """Replace ``fc`` and all projections of a loaded head by int8 ones; norms, biases and embedding stay.

    Raises ``UsageError`` as ``Int8Linear`` does.
    """
    replace_linears(head, lambda linear: Int8Linear(linear.weight, linear.bias))


def _check_kernel(weight: Tensor, scales: Tensor) -> None:
    """Raises ``UsageError`` unless a trial product can be made."""
    num_columns = weight.shape[1]
    if num_columns % _BLOCK:
        raise UsageError(
            f"int8 drafts need sizes that are multiples of {_BLOCK}, but this head has a matrix with {num_columns} "
            "columns; use the draft in the model's own dtype (auto)"
        )
    try:
        torch.ops.aten._weight_int8pack_mm(scales.new_zeros(1, num_columns), weight[:_BLOCK], scales[:_BLOCK])
    except (RuntimeError, AttributeError) as error:
        raise UsageError(
            f"torch {torch.__version__} cannot run int8 drafts on {weight.device} "
            f"({str(error).strip().splitlines()[0]}); use the draft in the model's own dtype (auto)"
        ) from error
