"""Trains an EAGLE-1/2 draft head for a target, on given text and on text that the target writes itself.

Losses and noise follow the published recipe (EAGLE, arXiv 2401.15077): smooth-L1 on the features, a little
cross-entropy against the target's distribution, uniform noise on the features that go in. At the end the head may be
unrolled over its own estimates (as in HASS, arXiv 2408.15766), which it meets when it drafts several levels deep.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowspec.model.eagle_head import EagleHead
from flowspec.train.corpus import Tokens
from flowspec.train.frozen_target import Target, head_config
from flowspec.train.loop import run_steps
from flowspec.train.losses import cross_entropy, expected_rows
from flowspec.train.own_text import Conversations
from flowspec.train.unroll import unroll
from flowspec.train.windows import DraftRecipe, batch_at, data_identity, generate_windows, optimiser_of


def train_head(
    target: Target,
    tokens: Tokens,
    recipe: DraftRecipe,
    work_dir: Path,
    out: Path,
    *,
    plan: Conversations | None = None,
    compiled: bool = False,
    checkpoint_interval_s: float = 180.0,
    stop_after: int | None = None,
) -> EagleHead:
    """Train to the end of the recipe on text ``tokens`` [T]; each checkpoint is saved in ``out`` as well.

    ``plan``: what the target writes itself are conversations. Data, noise and learning rate are functions of the step
    alone, so an interrupted run ends in the same weights as an uninterrupted one. ``stop_after``: the step to interrupt
    this run at.
    """
    generated = generate_windows(target, tokens, recipe, work_dir / "generated", plan)
    torch.manual_seed(recipe.seed)
    head = EagleHead(head_config(target.config), target.embedding).to(target.device)
    size = head.config.hidden_size
    losses = torch.compile(head_losses) if compiled else head_losses

    def learn(step: int) -> dict[str, float]:
        done = (step + 0.5) / recipe.num_steps
        num_levels = recipe.unroll_len if done > 1 - recipe.unroll_share else 1
        rows = batch_at(recipe, tokens, generated, step).to(target.device)
        noise = noise_at(recipe, step, size).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16):
            found = losses(head, target.lm_head, rows, target.features(rows), noise, num_levels)
        (recipe.feature_weight * found[0] + recipe.token_weight * found[1]).backward()
        return dict(zip(("feature", "token", "top1"), (figure.item() for figure in found), strict=True))

    run_steps(
        "draft head",
        head,
        optimiser_of(head, recipe, size),
        recipe,
        learn,
        work_dir / "draft.pt",
        asdict(recipe) | data_identity(target, tokens),
        lambda: head.save(out),
        checkpoint_interval_s=checkpoint_interval_s,
        stop_after=stop_after,
    )
    return head.eval().requires_grad_(False)


def head_losses(
    head: EagleHead, lm_head: Tensor, rows: Tensor, features: Tensor, noise: Tensor, num_levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Feature loss, token loss, and the share of first-level rows where head and target put the same token first.

    ``rows`` [B, T + 1] with the target's ``features`` [B, T + 1, H]; ``noise`` [B, T, H]. Mean over the draft levels.
    """
    truth = features[:, 1:]
    expected, true_best = (
        tensor.unflatten(0, truth.shape[:2]) for tensor in expected_rows(truth.flatten(0, 1), lm_head)
    )
    feature_loss = token_loss = hits = features.new_zeros(())
    for level, estimate in enumerate(unroll(head, rows, features[:, :-1] + noise, num_levels)):
        # The first `level` rows of a level would have needed tokens before the window.
        kept = estimate[:, level:].float()
        feature_loss = feature_loss + F.smooth_l1_loss(kept, truth[:, level:])
        losses, best = cross_entropy(kept.flatten(0, 1), expected[:, level:].flatten(0, 1), lm_head)
        token_loss = token_loss + losses.mean()
        if level == 0:
            hits = (best == true_best.flatten()).float().mean()
    return feature_loss / num_levels, token_loss / num_levels, hits


def noise_at(recipe: DraftRecipe, step: int, hidden_size: int) -> Tensor:
    """Uniform noise [B, T, H] of one step."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    shape = (recipe.rows_per_step, recipe.context_len, hidden_size)
    return (torch.rand(shape, generator=generator) - 0.5) * recipe.noise
