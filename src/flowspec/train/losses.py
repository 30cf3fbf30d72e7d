"""What a draft head's training minimises, without a matrix of all its logits in memory. Knows no model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS = 2**25  # elements of one matrix of logits; what needs more is taken in parts
_GPU_FACTOR = 4  # a GPU takes so many times more


def rows_at_a_time(lm_head: Tensor) -> int:
    """Rows whose logits, by ``lm_head`` [V, H], are in memory at a time."""
    return max(1, MAX_LOGITS * (_GPU_FACTOR if lm_head.is_cuda else 1) // len(lm_head))


@torch.no_grad()
def expected_rows(features: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """The row of ``lm_head`` [V, H] that each of the ``features`` [N, H] leads to in the mean, and the likeliest token.

    float32 [N, H] and int64 [N]. With q the distribution of a feature's logits, the first is the sum of ``q[v]
    lm_head[v]``; so the cross-entropy of an estimate e against q is ``log_partition(e) - e . expected``.
    """
    means, best = torch.empty_like(features, dtype=torch.float32), torch.empty(len(features), dtype=torch.long)
    best = best.to(features.device)
    step = rows_at_a_time(lm_head)
    for begin in range(0, len(features), step):
        part = slice(begin, begin + step)
        logits = F.linear(features[part].to(lm_head.dtype), lm_head)
        sums, best[part] = _sum_and_best(logits)
        means[part] = (_shares(logits, sums) @ lm_head).float()
    return means, best


def cross_entropy(estimates: Tensor, expected: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """Of estimated features [N, H] against the target's whole distributions, float32 [N], and the likeliest tokens [N].

    ``expected`` [N, H]: what ``expected_rows`` made of the true features. Differentiable in the estimates.
    """
    sums, best = log_partition(estimates, lm_head)
    return sums - (estimates * expected).sum(-1), best


def log_partition(estimates: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of ``exp(logits)``, float32 [N], and the likeliest tokens [N], of estimated features [N, H].

    Differentiable in the estimates; ``lm_head`` [V, H] is frozen.
    """
    return _LogPartition.apply(estimates, lm_head)  # pyright: ignore[reportReturnType]


def _sum_and_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float().logsumexp(-1), logits.argmax(-1)


def _shares(logits: Tensor, sums: Tensor) -> Tensor:
    """The probabilities, in the dtype of the logits [N, V]."""
    return (logits.float() - sums[:, None]).exp().to(logits.dtype)


class _LogPartition(torch.autograd.Function):
    """Logits are computed part by part, and again for the gradient: faster than to write and read them all."""

    @staticmethod
    def forward(ctx: Any, estimates: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.empty(len(estimates), device=estimates.device)
        best = torch.empty(len(estimates), dtype=torch.long, device=estimates.device)
        step = rows_at_a_time(lm_head)
        for begin in range(0, len(estimates), step):
            part = slice(begin, begin + step)
            logits = F.linear(estimates[part].to(lm_head.dtype), lm_head)
            sums[part], best[part] = _sum_and_best(logits)
        ctx.save_for_backward(estimates, lm_head, sums)
        ctx.mark_non_differentiable(best)
        return sums, best

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        estimates, lm_head, sums = ctx.saved_tensors
        result = torch.empty_like(estimates)
        step = rows_at_a_time(lm_head)
        for begin in range(0, len(estimates), step):
            part = slice(begin, begin + step)
            logits = F.linear(estimates[part].to(lm_head.dtype), lm_head)
            means = _shares(logits, sums[part]) @ lm_head
            result[part] = (means.float() * gradients[0][part, None]).to(result.dtype)
        return result, None
