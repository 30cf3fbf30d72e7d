"""Trains a target's hint heads, those of all boundaries between layers at once, on the draft head's windows.

The loss is the cross-entropy against the target's whole distribution, as in the tuned lens (arXiv 2303.08112), so that
a hint's probabilities can be trusted; nothing of the target is trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from flowspec.errors import ModelError, UsageError
from flowspec.model.hint_head import HintHead, save_hints
from flowspec.train.corpus import Tokens
from flowspec.train.frozen_target import Target
from flowspec.train.loop import run_steps
from flowspec.train.losses import rows_at_a_time
from flowspec.train.own_text import Conversations
from flowspec.train.windows import REFERENCE_WIDTH, DraftRecipe, batch_at, data_identity, generate_windows


@dataclass(frozen=True)
class HintRecipe:
    """Size and optimiser of a target's hint heads; the defaults are the shipped heads'."""

    rank: int = 32  # of what is learned between norm and lm_head
    num_tokens: int = 1_500_000  # training tokens in all
    batch_tokens: int = 4096  # tokens of one optimiser step
    learning_rate: float = 8e-3  # AdamW's highest, for hidden size 256; it goes with 1 / hidden size
    warmup_share: float = 0.03  # share of the run with rising learning rate
    max_gradient: float = 0.5  # gradients are clipped to this, value by value
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "num_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def steps(self, windows: DraftRecipe) -> DraftRecipe:
        """The steps of this training: windows as a draft head's, all else from here."""
        shared = {name: value for name, value in asdict(self).items() if name != "rank"}
        return replace(windows, **shared)


def train_hints(
    target: Target,
    tokens: Tokens,
    recipe: HintRecipe,
    windows: DraftRecipe,
    work_dir: Path,
    out: Path,
    *,
    plan: Conversations | None = None,
    checkpoint_interval_s: float = 180.0,
    stop_after: int | None = None,
) -> list[HintHead]:
    """Train the heads behind 1, 2, ... layers on text ``tokens`` [T]; each checkpoint is saved in ``out`` as well.

    ``windows`` is the draft head's recipe, with its ``plan``: the text that the target wrote for it in ``work_dir`` is
    used again. An interrupted run ends in the same weights as an uninterrupted one. ``stop_after``: the step to
    interrupt this run at.
    """
    generated = generate_windows(target, tokens, windows, work_dir / "generated", plan)
    steps = recipe.steps(windows)
    torch.manual_seed(recipe.seed)
    heads = _untrained_heads(target, recipe.rank)
    module = nn.ModuleList(heads).to(target.device)

    def learn(step: int) -> dict[str, float]:
        rows = batch_at(steps, tokens, generated, step).to(target.device)
        totals = torch.zeros(2)
        for part in rows.split(max(1, rows_at_a_time(target.lm_head) // rows.shape[1])):
            *hidden, features = target.hidden_states(part)
            true_logits = target.logits(features).flatten(0, 1)
            wanted, best = true_logits.softmax(-1), true_logits.argmax(-1)
            share = len(part) / len(rows)
            for head, states in zip(heads, hidden, strict=True):
                with torch.autocast(target.device.type, torch.bfloat16):
                    logits = head(states.flatten(0, 1))
                loss = F.cross_entropy(logits, wanted)
                (loss * share).backward()
                hits = (logits.argmax(-1) == best).float().mean()
                totals += torch.stack([loss, hits]).detach().cpu() * (share / len(heads))
        return dict(zip(("loss", "top1"), totals.tolist(), strict=True))

    rate = recipe.learning_rate * REFERENCE_WIDTH / target.config.hidden_size
    run_steps(
        "hint heads",
        module,
        torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.95)),
        steps,
        learn,
        work_dir / "hints.pt",
        {"hints": asdict(recipe), "windows": asdict(windows)} | data_identity(target, tokens),
        lambda: save_hints(out, heads),
        checkpoint_interval_s=checkpoint_interval_s,
        stop_after=stop_after,
    )
    module.eval().requires_grad_(False)
    return heads


def _untrained_heads(target: Target, rank: int) -> list[HintHead]:
    """One behind 1, 2, ... layers."""
    config = target.config
    if config.num_hidden_layers < 2:
        raise ModelError("the target has a single layer, and hints are given between layers; train without hints")
    return [
        HintHead.logit_lens(num_layers, target.final_norm, target.lm_head, rank, config.rms_norm_eps)
        for num_layers in range(1, config.num_hidden_layers)
    ]
