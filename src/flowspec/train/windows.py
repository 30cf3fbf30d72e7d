"""What all heads learn from: windows of given text and of the target's own, step by step. Knows no head."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flowspec.errors import UsageError
from flowspec.train.corpus import Tokens, shuffled_rows, windows
from flowspec.train.frozen_target import Target
from flowspec.train.own_text import Batches, Conversations, conversation_batch, text_batch

REFERENCE_WIDTH = 256  # hidden size that a recipe's learning rate is for


@dataclass(frozen=True)
class DraftRecipe:
    """Data mixture, losses and optimiser of a head; the defaults are the shipped head's."""

    num_tokens: int = 9_000_000  # training tokens in all
    batch_tokens: int = 4096  # tokens of one optimiser step
    context_len: int = 512  # tokens of a training window
    generated_share: float = 0.5  # share of the training windows that the target wrote itself
    num_generated_tokens: int = 300_000  # distinct tokens in such windows; a longer training reads them again
    generation_batch: int = 64  # windows that the target writes at a time
    prompt_len: int = 128  # tokens of the given text at the start of a window that the target goes on with
    greedy_share: float = 0.4  # share of the target's windows that it writes greedily
    temperature: float = 0.8  # of the others
    feature_weight: float = 1.0  # of the smooth-L1 loss on features
    token_weight: float = 0.1  # of the cross-entropy against the target's distribution
    noise: float = 0.2  # width of the uniform noise on features
    unroll_len: int = 1  # draft levels that are trained together at the end of the run; 1 turns unrolling off
    unroll_share: float = 0.25  # share of the steps that are trained unrolled
    learning_rate: float = 2e-3  # AdamW's highest, for hidden size 256; it goes with 1 / hidden size
    warmup_share: float = 0.03  # share of the run with rising learning rate
    max_gradient: float = 0.5  # gradients are clipped to this, value by value
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_tokens", "generation_batch", "unroll_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("generated_share", "greedy_share", "unroll_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 < self.prompt_len < self.context_len:
            raise UsageError(f"prompt_len is {self.prompt_len}; it must lie between 0 and {self.context_len}")

    @property
    def rows_per_step(self) -> int:
        return max(1, self.batch_tokens // self.context_len)

    @property
    def step_tokens(self) -> int:
        return self.rows_per_step * self.context_len

    @property
    def num_steps(self) -> int:
        return max(1, self.num_tokens // self.step_tokens)

    @property
    def num_generation_batches(self) -> int:
        """Enough for ``num_generated_tokens``, but no more than are read once."""
        wanted = min(self.num_generated_tokens, round(self.num_tokens * self.generated_share))
        return -(-wanted // (self.generation_batch * self.context_len))


def optimiser_of(head: nn.Module, recipe: DraftRecipe, hidden_size: int) -> torch.optim.AdamW:
    """Of EAGLE heads of all versions."""
    rate = recipe.learning_rate * REFERENCE_WIDTH / hidden_size
    return torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95))


def data_identity(target: Target, tokens: Tokens) -> dict[str, str]:
    """Tells a training's target and text from others."""
    return {"target": target.digest, "data": hashlib.sha256(tokens.tobytes()).hexdigest()[:12]}


def batch_at(recipe: DraftRecipe, tokens: Tokens, generated: Tokens, step: int) -> Tensor:
    """The windows of one step, int64 [B, T + 1]; the share of the target's own is kept over the steps."""
    num_rows = recipe.rows_per_step
    first, last = (int(s * num_rows * recipe.generated_share) if len(generated) else 0 for s in (step, step + 1))
    parts: list[Tokens] = []
    if (num_given := num_rows - (last - first)) > 0:
        parts.append(windows(tokens, recipe.context_len + 1, step * num_rows - first, num_given, recipe.seed))
    if last > first:
        parts.append(shuffled_rows(generated, first, last - first, recipe.seed + 1))
    return torch.from_numpy(np.concatenate(parts)).long()


def generate_windows(
    target: Target, tokens: Tokens, recipe: DraftRecipe, directory: Path, plan: Conversations | None = None
) -> Tokens:
    """Windows [N, T + 1] of the target's own text, greedy or sampled: conversations where there is a ``plan`` of them.

    Without one, they go on from given text. Finished batches are kept in ``directory`` and not generated again.
    """
    batches = Batches(recipe.num_generation_batches, recipe.generation_batch, recipe.context_len + 1)
    temperatures = torch.full((batches.num_rows,), recipe.temperature)
    temperatures[: round(batches.num_rows * recipe.greedy_share)] = 0.0
    settings = (batches.length, recipe.prompt_len, temperatures.tolist(), recipe.seed, target.digest, plan)
    if plan is None:
        write = text_batch(target.model, tokens, batches, recipe.prompt_len, temperatures, recipe.seed)
    else:
        write = conversation_batch(target.model, plan, tokens, batches, temperatures, recipe.seed)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return batches.write(directory, f"{settings} {digest}", write)
