"""From logits to tokens, with randomness that depends on nothing but (seed, position).

A token at a position is drawn by the Gumbel-max trick: the largest of ``log p + g`` over the vocabulary, where the
Gumbel noise ``g`` comes from a counter-based generator (Philox, Salmon et al. 2011) keyed by the request's seed with
the position in its counter. So a position's draw is the same whenever, wherever and however often it is made, and any
schedule emits the tokens of plain decoding with the same seed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.core import SamplingParams


def filtered_logprobs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities [V] in float64 after temperature, top-k and top-p; dropped tokens are -inf.

    ``logits`` [V] of any float type; ``params.temperature`` must be positive.
    """
    assert params.temperature > 0, "greedy decoding has no distribution"
    scaled = logits.detach().to("cpu", torch.float64) / params.temperature
    if 0 < params.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(params.top_k).values[-1], -torch.inf)
    logprobs = scaled.log_softmax(dim=-1)
    if params.top_p < 1:
        ordered, order = logprobs.sort(descending=True, stable=True)
        mass_before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        dropped = order[mass_before >= params.top_p]
        logprobs = logprobs.index_fill(0, dropped, -torch.inf).log_softmax(dim=-1)
    return logprobs


def gumbel_noise(seed: int, position: int, size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise [size] of one position."""
    # The position fills the counter's second word: the blocks of two positions never overlap.
    bits = np.random.Philox(key=seed, counter=position << 64).random_raw(size)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


class Sampler:
    """Chooses one request's tokens."""

    def __init__(self, params: SamplingParams) -> None:
        assert params.temperature == 0 or params.seed is not None, "the request's seed is drawn before it starts"
        self._params = params

    def token(self, logits: Tensor, position: int) -> int:
        """The token at ``position``, given the model's ``logits`` [V] after the position before it."""
        if self._params.temperature == 0:
            return int(logits.argmax())
        logprobs = filtered_logprobs(logits, self._params).numpy()
        assert self._params.seed is not None
        return int(np.argmax(logprobs + gumbel_noise(self._params.seed, position, len(logprobs))))
