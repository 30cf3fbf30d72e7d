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


class BestTokens:
    """An lm_head that names the most probable tokens alone: of a draft model that runs apart from the driver."""

    def __init__(self, head: LogitsHead) -> None:
        self._head = head

    @torch.inference_mode()
    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The at most ``k`` best next tokens of rows [n, H], best first: token ids and log-probabilities [n, k]."""
        logits = self._head.logits(hidden).float()
        best, token_ids = logits.topk(min(k, logits.shape[-1]))
        return token_ids, best - logits.logsumexp(-1, keepdim=True)


class FewTokensHead:
    """Logits of some tokens alone, by a head that has no others; for drafting (FR-Spec, arXiv 2502.14856).

    Most of what a small target writes is among a third of its vocabulary, and the lm_head is most of a draft's cost.
    """

    def __init__(self, head: LogitsHead, token_ids: Tensor, vocab_size: int) -> None:
        """``head``: of the tokens ``token_ids`` [N], in this order."""
        self._head = head
        self._token_ids = token_ids
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]; minus infinity for all other tokens."""
        few = self._head.logits(hidden)
        logits = few.new_full((len(few), self._vocab_size), -torch.inf)
        logits[:, self._token_ids.to(few.device)] = few
        return logits


class LogitsHead(Protocol):
    """``TargetHead``, or what stands in for it."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        ...
