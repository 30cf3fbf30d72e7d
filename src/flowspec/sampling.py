"""From logits to tokens, with randomness that depends on nothing but (seed, position).

A token at a position is drawn by the Gumbel-max trick: the largest of ``log p + g`` over the vocabulary, where the
Gumbel noise ``g`` comes from a counter-based generator (Philox, Salmon et al. 2011) keyed by the request's seed with
the position in its counter. So a position's draw is the same whenever, wherever and however often it is made, and any
schedule emits the tokens of plain decoding with the same seed.

The noise of a position is known before the target's distribution is. A draft that adds the same noise to its own
distribution guesses the token that will be drawn, and not only the one that is drawn most often: the two draws are
coupled (drafter-invariant speculative decoding, Daliri et al., arXiv 2408.07978). This steers guesses and nothing else.

The parameters act in the order of vLLM's V1 sampler: logit bias, repetition, frequency and presence penalty on the
logits, which is all that greedy decoding knows; then temperature, min-p, top-k and top-p. (transformers agrees but for
min-p, which it applies last.) Penalties know the tokens before a position and nothing else, so they too are the same
in any schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.core import SamplingParams, TokenLogprobs


def filtered_logprobs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities [V] in float64 after temperature, min-p, top-k and top-p; dropped tokens are -inf.

    ``logits`` [V] of any float type, penalised already; ``params.temperature`` must be positive.
    """
    assert params.temperature > 0, "greedy decoding has no distribution"
    scaled = logits.detach().to("cpu", torch.float64) / params.temperature
    if params.min_p > 0:
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(params.min_p), -torch.inf)
    if 0 < params.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(params.top_k).values[-1], -torch.inf)
    logprobs = scaled.log_softmax(dim=-1)
    if params.top_p < 1:
        ordered, order = logprobs.sort(descending=True, stable=True)
        mass_before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        dropped = order[mass_before >= params.top_p]
        logprobs = logprobs.index_fill(0, dropped, -torch.inf).log_softmax(dim=-1)
    return logprobs


def token_logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """The token's log-probability and the ``num_top`` best ones, by the model's ``logits`` [V] as they are."""
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = zip(ids.cpu().numpy().tolist(), values.cpu().numpy().tolist(), strict=True)
    return TokenLogprobs(token_id, float(logprobs[token_id]), tuple(top))


class Penalties:
    """What a text's tokens so far cost those that come next.

    Repetition as in transformers, over prompt and output; presence and frequency as in OpenAI's API, over the output
    alone.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params = params
        # By token id, as long as the largest of them needs, or the vocabulary.
        self._is_seen = np.bincount(prompt_ids).astype(np.bool_)
        self._counts = np.zeros(len(self._is_seen), dtype=np.int64)  # in the output

    def extend(self, token_ids: Sequence[int]) -> None:
        """These have become output."""
        self._grow(max(token_ids, default=0) + 1)
        self._is_seen[list(token_ids)] = True
        np.add.at(self._counts, list(token_ids), 1)

    def apply(self, logits: NDArray[np.float64], path: Sequence[int]) -> NDArray[np.float64]:
        """``logits`` [V] after the output and the tokens of ``path``, which follow it and may never become output."""
        self._grow(len(logits))
        penalised, seen_ids = np.array(logits), np.flatnonzero(self._is_seen[: len(logits)])
        penalised[seen_ids] = self._penalise(logits[seen_ids], self._counts[seen_ids])
        if path:
            ids, counts = np.unique(path, return_counts=True)
            penalised[ids] = self._penalise(logits[ids], self._counts[ids] + counts)
        return penalised

    def _penalise(self, logits: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of tokens that occur, and ``counts`` times in the output."""
        factor = self._params.repetition_penalty
        repeated = np.where(logits > 0, logits / factor, logits * factor)
        return repeated - self._params.frequency_penalty * counts - self._params.presence_penalty * (counts > 0)

    def _grow(self, size: int) -> None:
        if (missing := size - len(self._counts)) > 0:
            self._is_seen = np.pad(self._is_seen, (0, missing))
            self._counts = np.pad(self._counts, (0, missing))


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
_NEVER = -1e4  # log-probability of what a filter drops
_LEAST = -300.0  # that a draft or a hint says: the tree multiplies the two, and exp(2 * _LEAST) must not vanish


class Sampler:
    """Chooses one request's tokens."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        assert params.temperature == 0 or params.seed is not None, "the request's seed is drawn before it starts"
        self._params = params
        self._bias = dict(params.logit_bias)
        self._penalties = Penalties(params, prompt_ids) if params.has_penalties else None
        self._noise: dict[int, NDArray[np.float64]] = {}  # of positions from the newest draw on

    def token(self, logits: Tensor, position: int, path: Sequence[int] = ()) -> int:
        """The token at ``position``, given the model's ``logits`` [V] after the position before it.

        ``path``: the tokens before ``position`` that ``extend`` has not been told of.
        """
        logits = self._adjust(logits, path)
        if self._params.temperature == 0:
            return int(logits.argmax())
        logprobs = filtered_logprobs(logits, self._params).numpy()
        token_id = int(np.argmax(logprobs + self._noise_at(position, len(logprobs))))
        self._noise = {at: noise for at, noise in self._noise.items() if at > position}
        return token_id

    def extend(self, token_ids: Sequence[int]) -> None:
        """These have become output."""
        if self._penalties is not None:
            self._penalties.extend(token_ids)

    def _adjust(self, logits: Tensor, path: Sequence[int]) -> Tensor:
        """Logit bias and penalties: [V] in float64 on the CPU; the logits as they are where there are none."""
        if not self._bias and self._penalties is None:
            return logits
        adjusted = self._add_bias(logits.detach().to("cpu", torch.float64))
        if self._penalties is not None:
            adjusted = torch.as_tensor(self._penalties.apply(adjusted.numpy(), path))
        return adjusted

    def _add_bias(self, logits: Tensor) -> Tensor:
        """[..., V]."""
        if not self._bias:
            return logits
        ids = torch.tensor(list(self._bias), device=logits.device)
        values = torch.tensor(list(self._bias.values()), dtype=logits.dtype, device=logits.device)
        return logits.index_add(-1, ids, values.expand(*logits.shape[:-1], -1))

    def _noise_at(self, position: int, size: int) -> NDArray[np.float64]:
        if len(self._noise.get(position, ())) < size:
            assert self._params.seed is not None
            self._noise[position] = gumbel_noise(self._params.seed, position, size)
        return self._noise[position][:size]

    def draft_logprobs(self, logits: Tensor, positions: NDArray[np.int64]) -> Tensor:
        """How probable each token is to be the one drawn, as far as a draft with these logits can tell.

        ``logits`` [n, V] of the draft, ``positions`` [n] of the tokens that they guess; returns log-probabilities
        [n, V] in float32. Greedy: the draft's own. Else: its filtered distribution with the positions' noise. Logit
        bias counts in both; penalties do not.
        """
        biased = self._add_bias(logits.float())
        if self._params.temperature == 0:
            return biased.log_softmax(dim=-1)
        logprobs = self._filter_draft(biased / self._params.temperature)
        noise = np.stack([self._noise_at(position, logits.shape[-1]) for position in positions.tolist()])
        perturbed = logprobs + torch.as_tensor(noise, dtype=logprobs.dtype, device=logprobs.device)
        return (perturbed / DRAFT_SPREAD).log_softmax(dim=-1).clamp(min=_LEAST)

    def hint_logprobs(
        self, token_ids: NDArray[np.int64], logprobs: NDArray[np.float64], positions: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """As ``draft_logprobs``, where a few tokens are named for each position: all [n, k], ``positions`` [n].

        What is returned leaves a part to the tokens that are not named, as what is given does.
        """
        if self._params.temperature == 0 and not self._bias:
            return logprobs
        rest = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1, keepdims=True), 1e-6))
        ids = token_ids.tolist()
        if self._bias:
            logprobs = logprobs + np.array([[self._bias.get(token_id, 0.0) for token_id in row] for row in ids])
        scores = np.concatenate([logprobs, rest], axis=1)
        if self._params.temperature == 0:
            return torch.as_tensor(scores).log_softmax(dim=-1)[:, :-1].numpy()
        noise = np.stack(
            [self._noise_at(at, max(row) + 1)[row] for at, row in zip(positions.tolist(), ids, strict=True)]
        )
        # What is not named gets the noise's mean.
        perturbed = scores / self._params.temperature + np.pad(noise, ((0, 0), (0, 1)), constant_values=np.euler_gamma)
        return torch.as_tensor(perturbed / DRAFT_SPREAD).log_softmax(dim=-1).clamp(min=_LEAST)[:, :-1].numpy()

    def _filter_draft(self, scaled: Tensor) -> Tensor:
        """As ``filtered_logprobs``, for many rows at once; ties at the edge are kept."""
        min_p, top_k, top_p = self._params.min_p, self._params.top_k, self._params.top_p
        if min_p > 0:
            scaled = scaled.masked_fill(scaled < scaled.amax(dim=-1, keepdim=True) + math.log(min_p), _NEVER)
        if 0 < top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k, dim=-1).values[:, -1:], _NEVER)
        logprobs = scaled.log_softmax(dim=-1)
        if top_p < 1:
            best = logprobs.topk(min(_MAX_TOP_P_TOKENS, logprobs.shape[-1]), dim=-1).values
            is_kept = best.exp().cumsum(dim=-1) - best.exp() < top_p
            threshold = best.masked_fill(~is_kept, torch.inf).amin(dim=-1, keepdim=True)
            logprobs = logprobs.masked_fill((logprobs < threshold) & ~is_kept.all(dim=-1, keepdim=True), _NEVER)
        return logprobs
