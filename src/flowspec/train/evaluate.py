"""Measures a target, its draft head and its hints: held-out loss, hit rates, tokens per target pass with a tree.

Self-contained on purpose: one process, no pipeline, no schedule. The target's continuation of each prompt is generated
first; drafts are then checked against it, which gives what exact verification gives: at a position the target's token
is fixed, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from flowspec.errors import UsageError
from flowspec.model.draft_head import DraftHead
from flowspec.model.eagle_head import EagleHead
from flowspec.model.hint_head import HintHead
from flowspec.train.corpus import Tokens, windows
from flowspec.train.frozen_target import Target
from flowspec.train.own_text import Conversations, continue_rows, converse
from flowspec.train.target import held_out_loss
from flowspec.train.unroll import unroll
from flowspec.train.windows import DraftRecipe

_NUM_STEADINESS_ROWS, _STEADINESS_LEN, _STEADINESS_LEVELS = 16, 128, 8


@dataclass(frozen=True)
class EvaluationConfig:
    """Prompts and the EAGLE-2 tree (arXiv 2406.16858) they are measured with."""

    num_prompts: int = 20  # evenly spaced over the held-out text
    prompt_len: int = 64  # tokens
    num_new_tokens: int = 128  # tokens the target continues each prompt with
    temperature: float = 0.8  # of the sampled continuations
    num_levels: int = 8  # draft levels whose hit rate is measured
    top_k: int = 10  # children drafted for a node, and nodes expanded in one draft pass
    depth: int = 6  # levels of the tree below its root
    size: int = 60  # nodes of the tree, its root included: the best by score
    loss_window_len: int = 512  # tokens of context the held-out loss is measured with
    seed: int = 0


@dataclass(frozen=True)
class HitRate:
    """Share of tokens that are a guesser's first guess, or among its first four."""

    top_1: float
    top_4: float


@dataclass(frozen=True)
class HintResult:
    """Hit rates of the hints behind ``num_layers`` layers, over all tokens and over those that need a hint."""

    num_layers: int
    all_tokens: HitRate
    draft_wrong: HitRate  # where the draft head's first guess at level 1 is wrong
    draft_lacks: HitRate  # where the token is not even among its first ``top_k``


@dataclass(frozen=True)
class TextResult:
    """What was measured on one kind of continuation."""

    hit_rates: list[float]  # share of right top-1 tokens at draft level 1, 2, ...: true tokens, own features
    tokens_per_pass: float  # new tokens per target forward, the bonus token included
    mean_accepted: float  # draft nodes accepted per target forward
    distinct_4_grams: float  # share of different ones among all runs of four new tokens of a text; low for loops
    draft_wrong: float  # share of the tokens that are not the draft head's first guess at level 1
    draft_lacks: float  # share of those that are not among its first ``top_k``
    hints: list[HintResult]  # by boundary, from the first; empty for a draft without hints


@dataclass(frozen=True)
class Evaluation:
    config: EvaluationConfig
    held_out_loss: float  # nats per token
    num_held_out_tokens: int
    greedy: TextResult
    sampled: TextResult

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        config = self.config
        levels = " | ".join(str(level) for level in range(1, config.num_levels + 1))
        lines = [
            f"Held-out loss: {self.held_out_loss:.3f} nats per token ({self.num_held_out_tokens} tokens).",
            "",
            f"Drafting, on {config.num_prompts} held-out prompts of {config.prompt_len} tokens, "
            f"{config.num_new_tokens} new tokens each; "
            f"tree: top-k {config.top_k}, depth {config.depth}, {config.size} nodes with the root:",
            "",
            "| text | tokens per target pass | accepted per pass | distinct 4-grams |",
            "|---|---|---|---|",
        ]
        for name, text in self._texts().items():
            row = f"{text.tokens_per_pass:.2f} | {text.mean_accepted:.2f} | {text.distinct_4_grams:.2f}"
            lines.append(f"| {name} | {row} |")
        lines += [
            "",
            "Text with few distinct 4-grams repeats itself, and loops are easy to draft: the greedy figures flatter "
            "the head; the sampled ones are the harder control.",
            "",
            "Top-1 hit rate by draft level (true tokens, the head's own features):",
            "",
            f"| text | {levels} |",
            "|---" * (config.num_levels + 1) + "|",
        ]
        for name, text in self._texts().items():
            lines.append(f"| {name} | {' | '.join(f'{rate:.2f}' for rate in text.hit_rates)} |")
        return "\n".join(lines) + "\n"

    def hints_to_markdown(self) -> str:
        top_k = self.config.top_k
        lines = [
            "Hits of the hints among the same new tokens, first guess / first four guesses: among all of them, among "
            "those that are not the draft head's first guess, and among those that are not even among its first "
            f"{top_k} (in brackets their share of all):",
        ]
        for name, text in self._texts().items():
            lines += [
                "",
                f"| {name}: layers | all | not the draft's first ({text.draft_wrong:.1%}) "
                f"| not in its first {top_k} ({text.draft_lacks:.1%}) |",
                "|---|---|---|---|",
            ]
            for hint in text.hints:
                rates = (hint.all_tokens, hint.draft_wrong, hint.draft_lacks)
                cells = " | ".join(f"{rate.top_1:.2f} / {rate.top_4:.2f}" for rate in rates)
                lines.append(f"| {hint.num_layers} | {cells} |")
        return "\n".join(lines) + "\n"

    def _texts(self) -> dict[str, TextResult]:
        return {"greedy": self.greedy, f"sampled, temperature {self.config.temperature:g}": self.sampled}


@torch.inference_mode()
def evaluate(
    target: PreTrainedModel,
    head: EagleHead,
    held_out: Tokens,
    config: EvaluationConfig | None = None,
    hints: Sequence[HintHead] = (),
    draft_lm_head: nn.Module | None = None,
) -> Evaluation:
    """Measure on a held-out stream of tokens [T]; all weights must be in the same dtype (float32 for exactness).

    ``draft_lm_head``: the copy of the target's lm_head that the draft guesses with, if it has one.
    """
    config = config or EvaluationConfig()
    greedy, sampled = measure_texts(target, head, held_out, config, hints, draft_lm_head)
    loss = held_out_loss(target, held_out, config.loss_window_len)
    return Evaluation(config, loss, len(held_out), greedy, sampled)


@torch.inference_mode()
def measure_texts(
    target: PreTrainedModel,
    head: EagleHead,
    held_out: Tokens,
    config: EvaluationConfig,
    hints: Sequence[HintHead] = (),
    draft_lm_head: nn.Module | None = None,
) -> tuple[TextResult, TextResult]:
    """The draft alone, where the target continues held-out prompts: greedy, and sampled. Arguments as there."""
    if len(held_out) < config.num_prompts * config.prompt_len:
        raise UsageError(f"{len(held_out)} held-out tokens are too few for {config.num_prompts} prompts; add text")
    prompts = _spaced_prompts(held_out, config)
    texts: list[TextResult] = []
    for temperature in (0.0, config.temperature):
        generator = torch.Generator().manual_seed(config.seed)
        length = config.prompt_len + config.num_new_tokens
        temperatures = torch.full((len(prompts),), temperature)
        token_ids = continue_rows(target, prompts, length, temperatures, generator)
        texts.append(_measure(target, head, hints, token_ids, config, draft_lm_head or target.get_output_embeddings()))
    greedy, sampled = texts
    return greedy, sampled


def _spaced_prompts(held_out: Tokens, config: EvaluationConfig) -> Tensor:
    """Prompts [N, P] that begin at even distances in the stream."""
    begins = np.linspace(0, len(held_out) - config.prompt_len, config.num_prompts, endpoint=False).astype(int)
    return torch.from_numpy(np.stack([held_out[begin : begin + config.prompt_len] for begin in begins]))


def _measure(
    target: PreTrainedModel,
    head: EagleHead,
    hints: Sequence[HintHead],
    token_ids: Tensor,
    config: EvaluationConfig,
    lm_head: Any,
) -> TextResult:
    model: Any = target
    hidden_states = model.model(input_ids=token_ids, use_cache=False, output_hidden_states=True).hidden_states
    features = hidden_states[-1]
    num_tokens = num_passes = 0
    for row_ids, row_features in zip(token_ids, features, strict=True):
        run_tokens, run_passes = run_with_trees(head, lm_head, row_ids, row_features, config)
        num_tokens += run_tokens
        num_passes += run_passes
    draft_ranks = _draft_ranks(head, lm_head, token_ids, features, config)
    return TextResult(
        hit_rates=hit_rates(head, lm_head, token_ids, features, config.prompt_len, config.num_levels),
        tokens_per_pass=num_tokens / num_passes,
        mean_accepted=num_tokens / num_passes - 1,
        distinct_4_grams=float(np.mean([_distinct_share(row[config.prompt_len :].tolist(), 4) for row in token_ids])),
        draft_wrong=_share(draft_ranks > 0),
        draft_lacks=_share(draft_ranks >= config.top_k),
        hints=[_hint_result(hint, hidden_states[hint.num_layers], token_ids, draft_ranks, config) for hint in hints],
    )


def hit_rates(
    head: DraftHead,
    lm_head: Callable[[Tensor], Tensor],
    token_ids: Tensor,
    features: Tensor,
    prompt_len: int,
    num_levels: int,
) -> list[float]:
    """How often the head's first guess is right at draft level 1, 2, ...: true tokens, its own features.

    ``token_ids`` [B, T] with the target's ``features`` [B, T, D]; tokens from ``prompt_len`` on are counted.
    """
    return [
        (guesses[:, prompt_len - 2 :] == token_ids[:, prompt_len:]).float().mean().item()
        for guesses in first_guesses(head, lm_head, token_ids, features, num_levels)
    ]


def first_guesses(
    head: DraftHead, lm_head: Callable[[Tensor], Tensor], token_ids: Tensor, features: Tensor, num_levels: int
) -> Iterator[Tensor]:
    """The head's first guesses [B, T - 2] at tokens 2, 3, ... of ``token_ids`` [B, T], by draft level."""
    for predicted in unroll(head, token_ids, features[:, :-1], num_levels):
        # Row i predicts the feature of token i + 1, whose logits are those of token i + 2.
        yield lm_head(predicted[:, :-1]).argmax(-1)


@torch.inference_mode()
def measure_steadiness(
    head: DraftHead, lm_head: Callable[[Tensor], Tensor], token_ids: Tensor, counted: Tensor, features: Tensor
) -> list[float]:
    """Hit rates on ``new_text`` [B, T], for the head's config; ``features`` [B, T, D]: the target's of that text."""
    levels = first_guesses(head.float(), lm_head, token_ids, features, _STEADINESS_LEVELS)
    return [_share((guesses == token_ids[:, 2:])[counted[:, 2:]]) for guesses in levels]


@torch.inference_mode()
def new_text(
    target: Target, tokens: Tokens, recipe: DraftRecipe, plan: Conversations | None = None
) -> tuple[Tensor, Tensor]:
    """Text of the target's own that no training has seen, sampled, [B, T], and which of its tokens count.

    These are its answers where there is a ``plan``; without one, what it goes on with after given ``tokens`` [T].
    """
    num_rows, length = _NUM_STEADINESS_ROWS, recipe.prompt_len
    length += min(_STEADINESS_LEN, recipe.context_len - recipe.prompt_len)
    temperatures = torch.full((num_rows,), recipe.temperature)
    seed = recipe.seed + 3
    if plan is None:
        given = torch.from_numpy(windows(tokens, recipe.prompt_len, 0, num_rows, seed)).long()
        token_ids = continue_rows(target.model, given, length, temperatures, torch.Generator().manual_seed(recipe.seed))
        counted = torch.ones_like(token_ids, dtype=torch.bool)
        counted[:, : recipe.prompt_len] = False
    else:
        generator = torch.Generator(target.device).manual_seed(seed)
        beginnings = plan.beginnings(num_rows, tokens, seed)
        token_ids = converse(target.model, plan, beginnings, length, temperatures, generator)
        counted = plan.answers(token_ids)
    return token_ids.to(target.device), counted.to(target.device)


def _draft_ranks(
    head: EagleHead, lm_head: torch.nn.Module, token_ids: Tensor, features: Tensor, config: EvaluationConfig
) -> Tensor:
    """Places [B, N] of the new tokens in the head's order at draft level 1, from 0."""
    (predicted,) = unroll(head, token_ids, features[:, :-1], 1)
    return _ranks(lm_head(predicted[:, config.prompt_len - 2 : -1]), token_ids[:, config.prompt_len :])


def _hint_result(
    hint: HintHead, hidden: Tensor, token_ids: Tensor, draft_ranks: Tensor, config: EvaluationConfig
) -> HintResult:
    """``hidden`` [B, T, H]: the hint's row i guesses token i + 1."""
    ranks = _ranks(hint(hidden[:, config.prompt_len - 1 : -1]), token_ids[:, config.prompt_len :])

    def rate(ranks: Tensor) -> HitRate:
        return HitRate(_share(ranks < 1), _share(ranks < 4))

    return HintResult(
        num_layers=hint.num_layers,
        all_tokens=rate(ranks),
        draft_wrong=rate(ranks[draft_ranks > 0]),
        draft_lacks=rate(ranks[draft_ranks >= config.top_k]),
    )


def _ranks(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Places of tokens [...] in the descending order of logits [..., V], from 0."""
    return (logits > logits.gather(-1, token_ids[..., None])).sum(-1)


def _share(hits: Tensor) -> float:
    return hits.float().mean().item() if hits.numel() else 0.0


def run_with_trees(
    head: DraftHead, lm_head: Callable[[Tensor], Tensor], token_ids: Tensor, features: Tensor, config: EvaluationConfig
) -> tuple[int, int]:
    """New tokens and target passes of one text [T] with features [T, H], a fresh tree for every pass."""
    prefilled = DynamicCache()
    positions = torch.arange(len(token_ids) - 1, device=token_ids.device)[None]
    causal = (positions[0][:, None] >= positions)[None, None]
    predicted = head(token_ids[None, 1:], features[None, :-1], positions, causal, prefilled)[0]
    text: list[int] = token_ids.tolist()
    root = config.prompt_len  # the prompt's own pass gave the first new token
    num_passes = 0
    while root < len(text) - 1:
        cache = DynamicCache()
        layer: Any = prefilled.layers[0]
        # The root's row is row root - 1, the last one with a verified feature.
        cache.update(layer.keys[:, :, :root], layer.values[:, :, :root], 0)
        children = draft_tree(head, lm_head, cache, predicted[root - 1], root, config)
        node = -1
        while root < len(text) - 1:
            root += 1
            if (node, text[root]) not in children:
                break  # the bonus token
            node = children[node, text[root]]
        num_passes += 1
    return len(text) - 1 - config.prompt_len, num_passes


def draft_tree(
    head: DraftHead,
    lm_head: Callable[[Tensor], Tensor],
    cache: DynamicCache,
    root_feature: Tensor,
    root_position: int,
    config: EvaluationConfig,
) -> dict[tuple[int, int], int]:
    """The nodes that EAGLE-2 would send, as (parent, token) -> node; -1 is the root.

    ``cache`` holds the head's rows up to the root's, ``root_feature`` [H] is what the root's row predicted.
    """
    k, device = config.top_k, root_feature.device
    prefix_len = cache.get_seq_length()
    scores, tokens = lm_head(root_feature).float().log_softmax(-1).topk(k)
    parents = torch.full((k,), -1, device=device)
    all_scores, all_tokens, all_parents = [scores], [tokens], [parents]
    beam = torch.arange(k, device=device)  # node ids of the nodes that are expanded next
    beam_features = root_feature.expand(k, -1)
    seen = torch.empty(k, 0, dtype=torch.bool, device=device)  # which of the drafted rows are a beam node's ancestors
    num_nodes = k
    for level in range(config.depth - 1):
        seen = torch.cat((seen, torch.eye(k, dtype=torch.bool, device=device)), dim=1)
        mask = torch.cat((seen.new_ones(k, prefix_len), seen), dim=1)[None, None]
        positions = torch.full((1, k), root_position + level, device=device)
        predicted = head(tokens[None], beam_features[None], positions, mask, cache)[0]
        child_scores, child_tokens = lm_head(predicted).float().log_softmax(-1).topk(k)
        child_scores = (child_scores + scores[:, None]).flatten()
        all_scores.append(child_scores)
        all_tokens.append(child_tokens.flatten())
        all_parents.append(beam.repeat_interleave(k))
        scores, best = child_scores.topk(k)
        tokens = child_tokens.flatten()[best]
        beam, beam_features, seen = num_nodes + best, predicted[best // k], seen[best // k]
        num_nodes += k * k
    # Stable: of equal scores the parent comes first, so what is kept is connected.
    kept = torch.cat(all_scores).sort(descending=True, stable=True).indices[: config.size - 1]
    kept_parents, kept_tokens = torch.cat(all_parents)[kept], torch.cat(all_tokens)[kept]
    pairs = zip(kept_parents.tolist(), kept_tokens.tolist(), strict=True)
    return dict(zip(pairs, kept.tolist(), strict=True))


def _distinct_share(token_ids: list[int], n: int) -> float:
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return len(set(grams)) / len(grams)
