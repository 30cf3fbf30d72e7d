"""A language without weights, for studies of schedules: every context has a known next token, by hash.

A stage here attends as a real one does: each row sees exactly the slots that its mask shows, and its hidden state is a
hash of what it saw, checked again at every stage. So wrong masks, slots or prunings change the text, as they would with
a real model, while a forward costs microseconds.

``Language`` says what follows a context, and what a draft would guess that has extrapolated for some steps. Contexts
differ in how sure the draft can be: its probability of the best token follows a mixture of two Beta distributions, one
of sure and one of unsure contexts, the other candidates share the rest by Zipf's law, and a part of it lies outside
what any draft proposes. The next token is drawn from the draft's own distribution, so its scores are calibrated. With
every step of extrapolation the draft's logits get noise of their own for each (context, token), and temper with it:
little within the steps that the draft was trained for, where it reads features of its own making, and much beyond.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.errors import UsageError
from flowspec.model.slots import SlotTable
from flowspec.model.stage import Part, Watch

VOCAB_SIZE = 64
NUM_CANDIDATES = 24  # tokens of a context that a draft may propose
STYLE_LEN = 8  # the first tokens of a text decide how predictable all of it is

# How often a hint head's first guess is right after a share of the layers, where the right token is the draft's first
# guess, another of its first NUM_LISTED, or none of them: of greedy and of sampled text, which repeats itself less.
# Measured on the demo pair (benchmarks/demo_draft.py).
NUM_LISTED = 10
FORESEEN_WRONG = -12.0  # a clairvoyant draft's log-probability of what it knows to be wrong
HINT_STRAY = 0.15  # of wrong guesses lie outside the draft's list
HINT_DEPTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
GREEDY_HINT_RATES = (
    (0.0, 0.24, 0.30, 0.37, 0.45, 0.80, 0.95, 0.97, 1.0),
    (0.0, 0.07, 0.13, 0.17, 0.22, 0.40, 0.58, 0.69, 1.0),
    (0.0, 0.00, 0.00, 0.00, 0.00, 0.06, 0.06, 0.17, 1.0),
)
SAMPLED_HINT_RATES = (
    (0.0, 0.27, 0.32, 0.44, 0.52, 0.80, 0.91, 0.94, 1.0),
    (0.0, 0.10, 0.11, 0.16, 0.20, 0.25, 0.30, 0.33, 1.0),
    (0.0, 0.01, 0.01, 0.01, 0.02, 0.04, 0.04, 0.06, 1.0),
)

Hashes = NDArray[np.uint64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DraftQuality:
    """A calibration: how well a draft knows the language."""

    name: str
    sure_share: float  # of contexts
    sure: tuple[float, float]  # Beta distribution of the best token's probability in sure contexts
    unsure: tuple[float, float]  # in the others
    outside_share: float  # of the probability beyond the best token: lies outside all candidates
    noise: float  # standard deviation of the logits' noise one step of extrapolation beyond the trained ones
    noise_power: float = 0.55  # it grows with this power of the steps
    temper: float = 0.12  # logits are divided by the root of 1 + temper * variance of their noise
    trained_steps: int = 1  # of extrapolation that the draft was trained for
    own_noise: float = 0.0  # as ``noise``, of each trained step: the features are of the draft's own making
    block_len: int = 1  # levels that one pass guesses at once
    detour_noise: float = 0.0  # as ``noise``, of each token on the way that was not the block's own first guess
    style_deviation: float = 0.3  # of texts: a shift of the best token's logit
    sharpness: float = 0.6  # of the target's probability lies on its greedy token
    flatness: float = 0.05  # of it is spread over all tokens, which no draft can foresee
    is_clairvoyant: bool = False  # it knows which of its candidates, if any, is the greedy token

    def deviation(self, staleness: NDArray[np.int64], detours: NDArray[np.int64] | int = 0) -> Floats:
        """Of the logits' noise after so many steps of extrapolation; 1 is fresh."""
        trained = np.minimum(staleness, self.trained_steps) - 1.0
        beyond = np.maximum(staleness - self.trained_steps, 0).astype(np.float64)
        own = self.own_noise * trained**self.noise_power + self.noise * beyond**self.noise_power
        return np.hypot(own, self.detour_noise * np.sqrt(detours))


# docs/METHODOLOGY.md says what each stands for, benchmarks/synthetic_language.py shows what each gives.
QUALITIES = {
    "eagle1": DraftQuality("eagle1", 0.5, (12.0, 0.55), (1.6, 1.5), 0.19, 0.75),
    "eagle3": DraftQuality("eagle3", 0.6, (12.0, 0.5), (2.2, 1.3), 0.17, 0.75, trained_steps=7, own_noise=0.25),
    "weak": DraftQuality("weak", 0.2, (9.0, 0.9), (0.9, 1.7), 0.25, 0.75, trained_steps=3, own_noise=0.25),
    "demo": DraftQuality("demo", 0.75, (14.0, 0.35), (2.4, 1.1), 0.0, 0.3, trained_steps=16, own_noise=0.25),
    "block": DraftQuality(
        "block",
        0.65,
        (12.0, 0.5),
        (2.2, 1.3),
        0.17,
        0.0,
        temper=0.0,
        trained_steps=15,
        own_noise=0.35,
        block_len=15,
        detour_noise=1.0,
    ),
    "ideal": DraftQuality("ideal", 0.6, (12.0, 0.5), (2.2, 1.3), 0.17, 0.0),
}
QUALITIES |= {
    f"{name}-clairvoyant": replace(own, name=f"{name}-clairvoyant", is_clairvoyant=True)
    for name, own in QUALITIES.items()
}
# Of the demo pair's sampled text; the other calibrations stand for the same draft at every temperature.
SAMPLED_QUALITIES = {
    "demo": DraftQuality("demo", 0.3, (12.0, 0.7), (1.4, 1.8), 0.15, 0.3, trained_steps=16, own_noise=0.22),
}


def quality(name: str, is_sampled: bool = False) -> DraftQuality:
    """Of greedy or of sampled text. Raises ``UsageError`` for a name that is none."""
    if name not in QUALITIES:
        raise UsageError(f"draft quality {name!r} is none of {', '.join(QUALITIES)}")
    return SAMPLED_QUALITIES.get(name, QUALITIES[name]) if is_sampled else QUALITIES[name]


def mix(values: Hashes) -> Hashes:
    """Scatter the bits (the finaliser of SplitMix64); 0 stays 0."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(hashes: Hashes, salt: int) -> Floats:
    """Uniform in (0, 1), another for each salt."""
    bits = mix(hashes + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(hashes: Hashes) -> Floats:
    """Standard normal, nearly: the sum of four uniform draws."""
    bits = mix(hashes)
    parts = sum(((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float64) for shift in (0, 16, 32, 48))
    return (parts * 2.0**-16 - 2.0) * 3.0**0.5


def increments(token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each token adds to the contexts that see it: (context, style), both int64 hashes; [n, 2]."""
    hashes = mix((positions.astype(np.uint64) << np.uint64(20)) + token_ids.astype(np.uint64) + np.uint64(1))
    style = np.where(positions < STYLE_LEN, mix(hashes), np.uint64(0))
    return np.stack([hashes, style], axis=-1).view(np.int64)


def random_contexts(num: int) -> NDArray[np.int64]:
    """As different texts would lead to; [num, 2], always the same ones."""
    return np.random.default_rng(0).integers(-(2**63), 2**63, size=(num, 2), dtype=np.int64)


class Language:
    """What follows a context. ``contexts`` [n, 2] are sums of ``increments`` over all tokens, as int64."""

    def __init__(self, draft_quality: DraftQuality, is_sampled: bool = False) -> None:
        """``is_sampled``: of texts at temperatures above 0, where hints are less often right."""
        self.quality = draft_quality
        self._hint_rates = SAMPLED_HINT_RATES if is_sampled else GREEDY_HINT_RATES
        self._known_hint_rates: dict[float, float] = {}  # by depth, as far as anybody has asked

    @cached_property
    def _quantiles(self) -> tuple[Floats, Floats]:
        """The best token's logit by quantile, of the mixture of Beta distributions."""
        logits = np.linspace(-16.0, 24.0, 8001)
        log_p, log_q = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
        cumulative = np.zeros_like(logits)
        quality = self.quality
        for share, (a, b) in ((quality.sure_share, quality.sure), (1 - quality.sure_share, quality.unsure)):
            density = np.exp(a * log_p + b * log_q)  # in logits: the Jacobian adds one power to each
            cumulative += share * np.cumsum(density) / density.sum()
        return cumulative, logits

    @cached_property
    def _zipf_logs(self) -> Floats:
        """Logs of the shares [NUM_CANDIDATES - 1] of the candidates after the best."""
        shares = np.arange(1, NUM_CANDIDATES, dtype=np.float64) ** -1.25
        return np.log(shares / shares.sum())

    def candidates(self, contexts: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
        """All tokens, the draft's candidates first, best first, and log-probabilities of the candidates.

        Shapes [n, VOCAB_SIZE] and [n, NUM_CANDIDATES].
        """
        hashes = mix(contexts[:, 0].view(np.uint64))
        first = (hashes >> np.uint64(8)) & np.uint64(VOCAB_SIZE - 1)
        stride = (hashes >> np.uint64(20)) | np.uint64(1)  # odd, so that all tokens are met
        places = np.arange(VOCAB_SIZE, dtype=np.uint64)
        token_ids = (first[:, None] + stride[:, None] * places) & np.uint64(VOCAB_SIZE - 1)
        logits = np.interp(uniform(hashes, 1), *self._quantiles)
        logits += self.quality.style_deviation * normal(contexts[:, 1].view(np.uint64))
        log_best, log_rest = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
        rest = log_rest[:, None] + np.log(1 - self.quality.outside_share) + self._zipf_logs
        return token_ids.astype(np.int64), np.concatenate([log_best[:, None], rest], axis=1)

    def target_logits(self, contexts: NDArray[np.int64]) -> Floats:
        """The target's logits [n, VOCAB_SIZE]. The greedy token is drawn from the fresh draft's distribution.

        At temperature 1 the target's distribution is a blend: its greedy token, all tokens evenly, and the draft's.
        """
        token_ids, logprobs = self.candidates(contexts)
        outside = np.log(np.maximum(-np.expm1(np.logaddexp.reduce(logprobs, axis=1)), 1e-12))
        num_outside = VOCAB_SIZE - NUM_CANDIDATES
        rest = np.repeat((outside - np.log(num_outside))[:, None], num_outside, axis=1)
        shares = np.exp(np.concatenate([logprobs, rest], axis=1))
        draws = uniform(mix(contexts[:, 0].view(np.uint64)), 2)
        places = (np.cumsum(shares, axis=1) < draws[:, None]).sum(axis=1).clip(max=VOCAB_SIZE - 1)
        rows = np.arange(len(contexts))
        sharpness, flatness = self.quality.sharpness, self.quality.flatness
        mixed = (1 - sharpness - flatness) * shares + flatness / VOCAB_SIZE
        mixed[rows, places] += sharpness
        logits = np.empty_like(mixed)
        logits[rows[:, None], token_ids] = np.log(mixed)
        return logits

    def draft(
        self,
        contexts: NDArray[np.int64],
        staleness: NDArray[np.int64],
        top_k: int,
        detours: NDArray[np.int64] | int = 0,
    ) -> tuple[NDArray[np.int64], Floats]:
        """The draft's best tokens and their log-probabilities, both [n, top_k]; ``staleness`` [n], 1 is fresh.

        ``detours`` [n]: tokens on each one's way that the block did not guess first.
        """
        token_ids, logprobs = self.candidates(contexts)
        token_ids = token_ids[:, :NUM_CANDIDATES]
        deviation = self.quality.deviation(staleness, detours)[:, None]
        if deviation.any():
            hashes = mix(contexts[:, 0].view(np.uint64))[:, None] + token_ids.astype(np.uint64) + np.uint64(1)
            logits = (logprobs + deviation * normal(mix(hashes))) / (1 + self.quality.temper * deviation**2) ** 0.5
            shift = np.logaddexp.reduce(logprobs, axis=1) - np.logaddexp.reduce(logits, axis=1)
            logprobs = logits + shift[:, None]
        best = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
        best_ids, best_logprobs = (
            np.take_along_axis(token_ids, best, axis=1),
            np.take_along_axis(logprobs, best, axis=1),
        )
        if self.quality.is_clairvoyant:
            truths = self.target_logits(contexts).argmax(axis=1)
            _foresee(truths, (token_ids == truths[:, None]).any(axis=1), best_ids, best_logprobs)
        return best_ids, best_logprobs

    def hints(self, contexts: NDArray[np.int64], depth: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tokens [n] that a hint head names which has seen the share ``depth`` of the layers, and which are right.

        They are right as often as those of the demo pair; a wrong one is drawn from the draft's distribution, or lies
        outside of its list.
        """
        token_ids, logprobs = self.candidates(contexts)
        truths = self.target_logits(contexts).argmax(axis=1)
        ranks = (token_ids == truths[:, None]).argmax(axis=1)
        rates = np.array([np.interp(depth, HINT_DEPTHS, rates) for rates in self._hint_rates])
        hashes = mix(contexts[:, 0].view(np.uint64))
        # A hint that is right at some depth is so at all later ones.
        is_right = uniform(hashes, 3) < rates[np.where(ranks == 0, 0, np.where(ranks < NUM_LISTED, 1, 2))]
        others = np.where(np.arange(NUM_LISTED) == ranks[:, None], 0.0, np.exp(logprobs[:, :NUM_LISTED]))
        others *= (1 - HINT_STRAY) / others.sum(axis=1, keepdims=True)
        wrong = (np.cumsum(others, axis=1) < uniform(hashes, 4)[:, None]).sum(axis=1)
        strays = NUM_LISTED + (hashes >> np.uint64(40)).astype(np.int64) % (VOCAB_SIZE - NUM_LISTED)
        named = np.where(is_right, ranks, np.where(wrong < NUM_LISTED, wrong, strays))
        return token_ids[np.arange(len(named)), named], is_right

    def hint_rate(self, depth: float) -> float:
        """How often a hint is right."""
        if depth not in self._known_hint_rates:
            self._known_hint_rates[depth] = float(self.hints(random_contexts(2000), depth)[1].mean())
        return self._known_hint_rates[depth]

    @cached_property
    def usual_hit_rates(self) -> list[float]:
        return self.hit_rates()

    def hit_rates(self, num_steps: int = 24, num_contexts: int = 2000) -> list[float]:
        """How often the draft's first guess is the greedy token, after 1 .. ``num_steps`` steps of extrapolation."""
        contexts = random_contexts(num_contexts)
        targets = self.target_logits(contexts).argmax(axis=1)
        return [
            float((self.draft(contexts, np.full(num_contexts, step), top_k=1)[0][:, 0] == targets).mean())
            for step in range(1, num_steps + 1)
        ]


@cache
def language(draft_quality: DraftQuality, is_sampled: bool = False) -> Language:
    """One for all who ask: it keeps what it has found out of itself."""
    return Language(draft_quality, is_sampled)


def _foresee(
    truths: NDArray[np.int64], is_candidate: NDArray[np.bool_], token_ids: NDArray[np.int64], logprobs: Floats
) -> None:
    """Change guesses [n, k] in place: ``truths`` [n] that are candidates come first, all else is hardly probable."""
    is_truth = token_ids == truths[:, None]
    places = np.where(is_truth.any(axis=1), is_truth.argmax(axis=1), token_ids.shape[1] - 1)
    rows = np.flatnonzero(is_candidate)
    token_ids[rows, places[rows]] = token_ids[rows, 0]
    token_ids[rows, 0] = truths[rows]
    logprobs[:] = FORESEEN_WRONG
    logprobs[rows, 0] = 0.0


@dataclass
class SyntheticCache:
    """What a stage remembers of a request: the increments of every slot."""

    slots: SlotTable
    increments: NDArray[np.int64]  # [capacity, 2]


class SyntheticStage:
    """Hidden states [n, 4], int64: the row's own increments, and the context that it has seen."""

    hidden_size = 4
    dtype = torch.int64
    weights_bytes = 0
    slot_bytes = 16  # ``SyntheticCache``'s increments

    def __init__(self, is_first: bool, is_last: bool) -> None:
        self.is_first = is_first
        self.is_last = is_last

    def open_cache(self, root_id: int | None = None) -> SyntheticCache:
        slots = SlotTable(root_id)
        return SyntheticCache(slots, np.zeros((slots.capacity, 2), dtype=np.int64))

    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[Tensor | None]:
        """All at once: there is nothing to pause for, and no layer to watch."""
        yield torch.cat([self.forward(*part) for part in parts])

    def forward(self, inputs: Tensor, slots: NDArray[np.int64], cache: SyntheticCache) -> Tensor:
        """Sum up what the mask shows; where that is not what the stage before saw, the text goes astray."""
        if not len(slots):
            return torch.empty(0, self.hidden_size, dtype=torch.int64)
        table, rows = cache.slots, inputs.numpy()
        own = increments(rows, table.positions[slots]) if self.is_first else rows[:, :2]
        if len(cache.increments) < table.capacity:
            cache.increments = np.pad(cache.increments, ((0, table.capacity - len(cache.increments)), (0, 0)))
        cache.increments[slots] = own
        contexts = table.rows_mask(slots).astype(np.int64) @ cache.increments[: table.high_water]
        if not self.is_first:
            contexts = rows[:, 2:] + mix((contexts - rows[:, 2:]).view(np.uint64)).view(np.int64)
        return torch.from_numpy(np.concatenate([own, contexts], axis=1))


class SyntheticHinter:
    """Stands for a hint head behind some share of the layers; it knows how often it is right."""

    def __init__(self, language: Language, depth: float) -> None:
        self.language = language
        self.depth = depth
        self._logprob = math.log(language.hint_rate(depth))

    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """One token for each row, whatever ``k``."""
        token_ids, _ = self.language.hints(hidden.numpy()[:, 2:], self.depth)
        return torch.from_numpy(token_ids)[:, None], torch.full((len(hidden), 1), self._logprob, dtype=torch.float64)


class SyntheticHead:
    """Stands for the target's lm_head."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.from_numpy(self.language.target_logits(hidden.numpy()[:, 2:]))
