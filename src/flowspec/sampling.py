"""From logits to tokens, with randomness that depends on nothing but (seed, position).

A token at a position is drawn by the Gumbel-max trick: the largest of ``log p + g`` over the vocabulary, where the
Gumbel noise ``g`` comes from a counter-based generator (Philox, Salmon et al. 2011) keyed by the request's seed with
the position in its counter. So a position's draw is the same whenever, wherever and however often it is made, and any
schedule emits the tokens of plain decoding with the same seed.

The noise of a position is known before the target's distribution is. A draft that adds the same noise to its own
distribution guesses the token that will be drawn, and not only the one that is drawn most often: the two draws are
coupled (drafter-invariant speculative decoding, Daliri et al., arXiv 2408.07978). This steers guesses and nothing else.
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


# How far a draft's perturbed log-probabilities are from the target's, as a temperature: chosen on the demo pair, where
# tokens/s at temperature 0.8 are flat from 0.4 to 0.6. It orders guesses and decides no token.
DRAFT_SPREAD = 0.5
_MAX_TOP_P_TOKENS = 512  # of a draft's distribution that top-p looks at
_NEVER = -1e4  # log-probability of what a filter drops, finite so that scores stay numbers


class Sampler:
    """Chooses one request's tokens."""

    def __init__(self, params: SamplingParams) -> None:
        assert params.temperature == 0 or params.seed is not None, "the request's seed is drawn before it starts"
        self._params = params
        self._noise: dict[int, NDArray[np.float64]] = {}  # of positions from the newest draw on

    def token(self, logits: Tensor, position: int) -> int:
        """The token at ``position``, given the model's ``logits`` [V] after the position before it."""
        if self._params.temperature == 0:
            return int(logits.argmax())
        logprobs = filtered_logprobs(logits, self._params).numpy()
        token_id = int(np.argmax(logprobs + self._noise_at(position, len(logprobs))))
        self._noise = {at: noise for at, noise in self._noise.items() if at > position}
        return token_id

    def _noise_at(self, position: int, size: int) -> NDArray[np.float64]:
        if len(self._noise.get(position, ())) < size:
            assert self._params.seed is not None
            self._noise[position] = gumbel_noise(self._params.seed, position, size)
        return self._noise[position][:size]

    def draft_logprobs(self, logits: Tensor, positions: NDArray[np.int64]) -> Tensor:
        """How probable each token is to be the one drawn, as far as a draft with these logits can tell.

        ``logits`` [n, V] of the draft, ``positions`` [n] of the tokens that they guess; returns log-probabilities
        [n, V] in float32. Greedy: the draft's own. Else: its filtered distribution with the positions' noise.
        """
        if self._params.temperature == 0:
            return logits.float().log_softmax(dim=-1)
        logprobs = self._filter_draft(logits.float() / self._params.temperature)
        noise = np.stack([self._noise_at(position, logits.shape[-1]) for position in positions.tolist()])
        perturbed = logprobs + torch.as_tensor(noise, dtype=logprobs.dtype, device=logprobs.device)
        return (perturbed / DRAFT_SPREAD).log_softmax(dim=-1)

    def hint_logprobs(
        self, token_ids: NDArray[np.int64], logprobs: NDArray[np.float64], positions: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """As ``draft_logprobs``, where a few tokens are named for each position: all [n, k], ``positions`` [n].

        What is returned leaves a part to the tokens that are not named, as what is given does.
        """
        if self._params.temperature == 0:
            return logprobs
        rest = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1, keepdims=True), 1e-6))
        ids = token_ids.tolist()
        noise = np.stack(
            [self._noise_at(at, max(row) + 1)[row] for at, row in zip(positions.tolist(), ids, strict=True)]
        )
        # What is not named gets the noise's mean.
        scaled = np.concatenate([logprobs, rest], axis=1) / self._params.temperature
        perturbed = scaled + np.pad(noise, ((0, 0), (0, 1)), constant_values=np.euler_gamma)
        return torch.as_tensor(perturbed / DRAFT_SPREAD).log_softmax(dim=-1)[:, :-1].numpy()

    def _filter_draft(self, scaled: Tensor) -> Tensor:
        """As ``filtered_logprobs``, for many rows at once; ties at the edge are kept."""
        top_k, top_p = self._params.top_k, self._params.top_p
        if 0 < top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k, dim=-1).values[:, -1:], _NEVER)
        logprobs = scaled.log_softmax(dim=-1)
        if top_p < 1:
            best = logprobs.topk(min(_MAX_TOP_P_TOKENS, logprobs.shape[-1]), dim=-1).values
            is_kept = best.exp().cumsum(dim=-1) - best.exp() < top_p
            threshold = best.masked_fill(~is_kept, torch.inf).amin(dim=-1, keepdim=True)
            logprobs = logprobs.masked_fill((logprobs < threshold) & ~is_kept.all(dim=-1, keepdim=True), _NEVER)
        return logprobs
