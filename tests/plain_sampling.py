"""Sampling the plain way: everything in float64, sorted as a whole, with noise for the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from flowspec.core import SamplingParams


def filtered_logprobs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Log-probabilities [V] in float64 after temperature, min-p, top-k and top-p; dropped tokens are -inf."""
    values = logits.double().numpy()
    with np.errstate(over="ignore"):
        scaled = (values - values.max()) / params.temperature
    is_kept = np.ones(len(values), dtype=np.bool_)
    if params.min_p > 0:
        is_kept &= scaled >= math.log(params.min_p)
    if params.top_k > 0:
        is_kept &= values >= np.sort(values)[::-1][: params.top_k][-1]
    if params.top_p < 1:
        kept_ids, weights = np.flatnonzero(is_kept), np.exp(scaled)
        order = kept_ids[np.argsort(-weights[kept_ids], kind="stable")]
        mass_before = np.concatenate([np.zeros(1), weights[order].cumsum()[:-1]])
        is_kept[order[mass_before >= params.top_p * weights[kept_ids].sum()]] = False
    return torch.from_numpy(np.where(is_kept, scaled, -np.inf)).log_softmax(dim=-1)


def gumbel_noise(seed: int, position: int, size: int) -> NDArray[np.float64]:
    bits = np.random.Philox(key=seed, counter=position << 64).random_raw(size)
    return -np.log(-np.log(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53))


def plain_token(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    if params.temperature == 0:
        return int(logits.double().argmax())
    assert params.seed is not None
    logprobs = filtered_logprobs(logits, params).numpy()
    return int(np.argmax(logprobs + gumbel_noise(params.seed, position, len(logprobs))))
