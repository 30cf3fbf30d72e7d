"""The target's lm_head, which the driver holds: verification and drafting both need it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TargetHead:
    """Final hidden states in, logits out; ``weight`` [V, H]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        return torch.nn.functional.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight)


class LogitsHead(Protocol):
    """``TargetHead``, or what stands in for it."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        ...
