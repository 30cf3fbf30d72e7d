"""From logits to tokens, with randomness that depends on nothing but (seed, position).

A token at a position is drawn by the Gumbel-max trick: the largest of ``log p + g`` over the vocabulary, where the
Gumbel noise ``g`` is a function of the request's seed, the position and the token id (``noise``). So a position's draw
is the same whenever, wherever and however often it is made, and any schedule emits the tokens of plain decoding with
the same seed.

The noise of a position is known before the target's distribution is. A draft that adds the same noise to its own
distribution guesses the token that will be drawn, and not only the one that is drawn most often: the two draws are
coupled (drafter-invariant speculative decoding, Daliri et al., arXiv 2408.07978). This steers guesses and nothing else.

The parameters act in the order of vLLM's V1 sampler: logit bias, repetition, frequency and presence penalty on the
logits, which is all that greedy decoding knows; then temperature, min-p, top-k and top-p. (transformers agrees but for
min-p, which it applies last.) Penalties know the tokens before a position and nothing else, so they too are the same
in any schedule.

Of a vocabulary of 10^5 tokens only a few can be drawn. Noise is made for those alone, and the others are left out only
where it is certain that they cannot win: the token is that of the plain way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.core import SamplingParams, TokenLogprobs
from flowspec.errors import NumericalError
from flowspec.filters import FEW, NEVER, Floats, Ids, best, gaps_below, kept_ids, largest
from flowspec.noise import Noise

_LARGEST = 1e300  # logit that a penalty leaves
_STRIDE = 16  # of the tokens by which a draft's top-p estimates what the most probable ones leave


def finite_array(numbers: Tensor, what: str, position: int) -> Floats:
    """The model's numbers on the CPU, exactly, in a type that numpy computes in.

    Raises ``NumericalError`` where one of them is NaN or infinite; ``what`` and ``position`` are for its message.
    """
    array = _as_array(numbers)
    if not np.isfinite(array).all():
        num_nan, num_infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        advice = (
            "float16 overflows in this model, run it in bfloat16 or float32"
            if numbers.dtype == torch.float16
            else "the weights or a worker's cache are damaged, check the model's files and start the workers anew"
        )
        raise NumericalError(
            f"the model's {what} for position {position} are not finite ({num_nan} NaN and {num_infinite} infinite of "
            f"{array.size}, {str(numbers.dtype).removeprefix('torch.')}); {advice}"
        )
    return array


def _as_array(numbers: Tensor) -> Floats:
    # numpy has no bfloat16, and its float16 is slow.
    return (numbers if numbers.dtype == torch.float64 else numbers.float()).detach().cpu().numpy()


def _log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis."""
    gaps = scores - scores.max(axis=-1, keepdims=True)
    return gaps - np.log(np.exp(gaps).sum(axis=-1, keepdims=True))


def token_logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """The token's log-probability and the ``num_top`` best ones, by the model's ``logits`` [V] as they are."""
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = zip(ids.cpu().numpy().tolist(), values.cpu().numpy().tolist(), strict=True)
    return TokenLogprobs(token_id, float(logprobs[token_id]), tuple(top))


def _first(
    ids: Ids, logprobs: NDArray[np.float64], num: int, others: Callable[[], Ids]
) -> tuple[Ids, NDArray[np.float64]]:
    """The ``num`` best of the tokens ``ids`` [k], best first; where there are fewer, ``others`` fill the row up."""
    order = best(logprobs, min(num, len(ids)))
    if len(order) == num:
        return ids[order], logprobs[order]
    more = np.setdiff1d(others(), ids)[: num - len(order)]
    return np.append(ids[order], more), np.append(logprobs[order], np.full(len(more), _LEAST))


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

    def apply(self, logits: Floats, path: Sequence[int]) -> Floats:
        """``logits`` [V] after the output and the tokens of ``path``, which follow it and may never become output."""
        self._grow(len(logits))
        penalised, seen_ids = np.array(logits), np.flatnonzero(self._is_seen[: len(logits)])
        penalised[seen_ids] = self._penalise(logits[seen_ids], self._counts[seen_ids])
        if path:
            ids, counts = np.unique(path, return_counts=True)
            penalised[ids] = self._penalise(logits[ids], self._counts[ids] + counts)
        return penalised

    def _penalise(self, logits: Floats, counts: Ids) -> Floats:
        """Of tokens that occur, and ``counts`` times in the output."""
        factor = self._params.repetition_penalty
        with np.errstate(over="ignore"):
            repeated: NDArray[np.float64] = np.where(logits > 0, logits / factor, logits * factor)
            repeated = repeated.clip(-_LARGEST, _LARGEST)
        return repeated - self._params.frequency_penalty * counts - self._params.presence_penalty * (counts > 0)

    def _grow(self, size: int) -> None:
        if (missing := size - len(self._counts)) > 0:
            self._is_seen = np.pad(self._is_seen, (0, missing))
            self._counts = np.pad(self._counts, (0, missing))


# How far a draft's perturbed log-probabilities are from the target's, as a temperature: chosen on the demo pair, where
# tokens/s at temperature 0.8 are flat from 0.4 to 0.6. It orders guesses and decides no token.
DRAFT_SPREAD = 0.5
_LEAST = -300.0  # that a draft or a hint says: the tree multiplies the two, and exp(2 * _LEAST) must not vanish


class Sampler:
    """Chooses one request's tokens."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        assert params.temperature == 0 or params.seed is not None, "the request's seed is drawn before it starts"
        self._params = params
        self._bias = dict(params.logit_bias)
        self._bias_ids = np.array(list(self._bias), dtype=np.int64)
        self._penalties = Penalties(params, prompt_ids) if params.has_penalties else None
        self._noise = Noise(params.seed or 0)

    def token(self, logits: Tensor, position: int, path: Sequence[int] = ()) -> int:
        """The token at ``position``, given the model's ``logits`` [V] after the position before it.

        ``path``: the tokens before ``position`` that ``extend`` has not been told of. Raises ``NumericalError`` for
        logits that are not finite.
        """
        adjusted = self._adjust(finite_array(logits, "logits", position), path)
        if self._params.temperature == 0:
            return int(adjusted.argmax())
        adjusted = adjusted.astype(np.float64, copy=False)
        ids = kept_ids(adjusted, self._params)
        if ids is None:
            ids, perturbed = self._contenders(adjusted, largest(adjusted, FEW), position, 1)
        else:
            perturbed = self._perturb(self._gaps(adjusted[ids], adjusted.max()), ids, position)
        self._noise.forget(position)
        return int(ids[perturbed == perturbed.max()].min())

    def extend(self, token_ids: Sequence[int]) -> None:
        """These have become output."""
        if self._penalties is not None:
            self._penalties.extend(token_ids)

    def _adjust(self, logits: Floats, path: Sequence[int]) -> Floats:
        """Logit bias and penalties: [V] in float64; the logits as they are where there are none."""
        if not self._bias and self._penalties is None:
            return logits
        adjusted = self._add_bias(logits.astype(np.float64))
        return adjusted if self._penalties is None else self._penalties.apply(adjusted, path)

    def _add_bias(self, logits: Floats) -> Floats:
        """[..., V], changed in place."""
        if self._bias:
            logits[..., self._bias_ids] += list(self._bias.values())
        return logits

    def _gaps(self, logits: Floats, top: float) -> NDArray[np.float64]:
        return gaps_below(float(top), logits, self._params.temperature)

    def _perturb(self, gaps: NDArray[np.float64], ids: Ids, position: int) -> NDArray[np.float64]:
        """Log-probabilities, as ``gaps`` [k] below the highest one, plus noise, of the tokens ``ids`` [k].

        All that may be drawn includes the most probable token: where that is alone, no noise decides.
        """
        return gaps if len(ids) == 1 and gaps[0] == 0 else gaps + self._noise.of(position, ids)

    def _contenders(self, logits: Floats, likely: Ids, position: int, num: int) -> tuple[Ids, NDArray[np.float64]]:
        """Where nothing is filtered: the ``num`` tokens that noise puts first, and others, and what ``_perturb`` says.

        ``logits`` [V]; ``likely``: the most probable tokens, ``num`` or more.
        """
        top = logits[likely].max()
        gaps = self._gaps(logits[likely], top)
        perturbed = self._perturb(gaps, likely, position)
        # Every other token is less probable than these, so that it takes this noise at least to be among the best.
        level = np.partition(perturbed, -num)[-num] - gaps.min()
        is_other = self._noise.is_above(position, float(level), len(logits))
        is_other[likely] = False
        others = np.flatnonzero(is_other)
        others_perturbed = self._perturb(self._gaps(logits[others], top), others, position)
        return np.append(likely, others), np.append(perturbed, others_perturbed)

    def draft_children(self, logits: Tensor, positions: NDArray[np.int64], num: int) -> tuple[Ids, NDArray[np.float64]]:
        """The ``num`` tokens that are most probably the one drawn, as far as a draft with these logits can tell.

        ``logits`` [n, V] of the draft, ``positions`` [n] of the tokens that they guess; returns token ids and
        log-probabilities [n, num], best first. Greedy: by the draft's own distribution. Else: by its filtered one with
        the positions' noise. Logit bias counts in both; penalties do not. A row that is not finite guesses nothing.
        """
        num = min(num, logits.shape[-1])
        rows = _as_array(logits.float())
        if self._bias:
            rows = self._add_bias(np.array(rows))
        children = [self._children(row, at, num) for row, at in zip(rows, positions.tolist(), strict=True)]
        return np.stack([ids for ids, _ in children]), np.stack([logprobs for _, logprobs in children])

    def _children(self, logits: Floats, position: int, num: int) -> tuple[Ids, NDArray[np.float64]]:
        """``draft_children`` of one row [V]."""
        if not np.isfinite(logits.max()):
            return np.arange(num), np.full(num, _LEAST)
        if self._params.temperature == 0:
            ids = best(logits, num)
            gaps = logits - logits[ids[0]]
            return ids, (gaps[ids] - np.log(np.exp(gaps).sum())).astype(np.float64)
        ids, perturbed = self._draft_contenders(logits, position, num)
        return _first(ids, _log_softmax(perturbed / DRAFT_SPREAD).clip(min=_LEAST), num, lambda: largest(logits, num))

    def named_children(
        self, token_ids: Ids, logprobs: Floats, vocab_size: int, positions: NDArray[np.int64], num: int
    ) -> tuple[Ids, NDArray[np.float64]]:
        """As ``draft_children``, where a draft names its best tokens alone, and no other one is guessed.

        ``token_ids``, ``logprobs`` [n, k]; -1 for what it names, and is no token. ``vocab_size``: of all tokens.
        """
        num = min(num, vocab_size)
        rows = zip(token_ids, logprobs.astype(np.float64), positions.tolist(), strict=True)
        children = [self._named_children(*row, vocab_size, num) for row in rows]
        return np.stack([ids for ids, _ in children]), np.stack([values for _, values in children])

    def _named_children(
        self, ids: Ids, logprobs: NDArray[np.float64], position: int, vocab_size: int, num: int
    ) -> tuple[Ids, NDArray[np.float64]]:
        """``named_children`` of one row [k]."""
        num_others = max(0, vocab_size - len(ids))
        rest = max(0.0, 1 - np.exp(logprobs).sum()) if num_others else 0.0  # else it is what rounding has left
        ids, logprobs = ids[ids >= 0], logprobs[ids >= 0]
        if not len(ids) or not np.isfinite(logprobs.max()):
            return np.arange(num), np.full(num, _LEAST)
        if self._bias:
            logprobs = logprobs + [self._bias.get(token_id, 0.0) for token_id in ids.tolist()]
        if self._params.temperature == 0:
            kept, values = ids, logprobs - np.log(np.exp(logprobs).sum() + rest)
        else:
            top = logprobs.max()
            gaps = self._gaps(logprobs, top)
            # As if all others were equally probable.
            other = np.log([max(rest, sys.float_info.min) / max(1, num_others)])
            is_kept = self._keeps(gaps, lambda: num_others * float(np.exp(self._gaps(other, top)[0])))
            kept = ids[is_kept]
            values = _log_softmax(self._perturb(gaps[is_kept], kept, position) / DRAFT_SPREAD)
        return _first(kept, values.clip(min=_LEAST), num, lambda: np.append(ids, np.arange(num + len(ids))))

    def _draft_contenders(self, logits: Floats, position: int, num: int) -> tuple[Ids, NDArray[np.float64]]:
        """As ``_contenders``, of what the filters leave of a draft's row [V].

        Only the most probable tokens are filtered: filters that leave more than those count as none. Ties at an edge
        are kept.
        """
        top, likely = logits.max(), largest(logits, max(FEW, num))
        gaps = self._gaps(logits[likely], top)

        def others_mass() -> float:
            # Of the others there may be 10^5: about their mass is enough for a guess.
            sample = logits[::_STRIDE]
            return float(np.exp(self._gaps(sample[sample < logits[likely].min()], top)).sum() * _STRIDE)

        is_kept = self._keeps(gaps, others_mass)
        if is_kept.all():
            return self._contenders(logits, likely, position, num)
        return likely[is_kept], self._perturb(gaps[is_kept], likely[is_kept], position)

    def _keeps(self, gaps: NDArray[np.float64], others_mass: Callable[[], float]) -> NDArray[np.bool_]:
        """What the filters leave of the most probable tokens, with ``gaps`` [k] below the best one.

        ``others_mass``: of all other tokens, as that of these is ``exp(gaps).sum()``.
        """
        params, least = self._params, math.log(self._params.min_p) if self._params.min_p > 0 else NEVER
        if 0 < params.top_k < len(gaps):
            least = max(least, float(np.partition(gaps, -params.top_k)[-params.top_k]))
        if params.top_p < 1:
            descending = np.sort(gaps[gaps >= least])[::-1]
            masses = np.exp(descending).cumsum()
            mass = masses[-1] + (others_mass() if len(descending) == len(gaps) else 0.0)
            num_kept = int((masses < params.top_p * mass).sum()) + 1
            least = float(descending[num_kept - 1]) if num_kept <= len(descending) else least
        return gaps >= least

    def hint_logprobs(
        self, token_ids: NDArray[np.int64], logprobs: NDArray[np.float64], positions: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """As ``draft_children``, where a few tokens are named for each position: all [n, k], ``positions`` [n].

        What is returned leaves a part to the tokens that are not named, as what is given does.
        """
        if self._params.temperature == 0 and not self._bias:
            return logprobs
        rest = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1, keepdims=True), 1e-6))
        if self._bias:
            logprobs = logprobs + np.array([[self._bias.get(i, 0.0) for i in row] for row in token_ids.tolist()])
        scores = np.concatenate([logprobs, rest], axis=1)
        if self._params.temperature == 0:
            return _log_softmax(scores)[:, :-1]
        noise = np.stack([self._noise.of(at, ids) for at, ids in zip(positions.tolist(), token_ids, strict=True)])
        # What is not named gets the noise's mean.
        perturbed = np.stack([self._gaps(row, row.max()) for row in scores])
        perturbed += np.pad(noise, ((0, 0), (0, 1)), constant_values=np.euler_gamma)
        return _log_softmax(perturbed / DRAFT_SPREAD).clip(min=_LEAST)[:, :-1]
