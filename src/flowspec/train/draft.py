"""Trains all that a draft directory holds, the draft head and its hints, on given text and on the target's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowspec.errors import ModelError, UsageError
from flowspec.model.backends import open_checkpoint
from flowspec.train.block import BlockRecipe, BlockShape, level_rates, train_block_head
from flowspec.train.corpus import Tokens, encode_documents, read_documents
from flowspec.train.eagle import DraftRecipe, Target, generate_windows, train_head
from flowspec.train.evaluate import measure_steadiness, new_text
from flowspec.train.hints import HintRecipe, train_hints
from flowspec.train.own_text import Conversations

logger = logging.getLogger("flowspec.train")

CHAT_RECIPE = DraftRecipe(
    learning_rate=2.7e-3,
    generated_share=1.0,
    temperature=0.9,
    # What is aimed at is acceptance: the target's distribution, at the levels that a tree has.
    feature_weight=0.2,
    token_weight=1.0,
    noise=0.1,
    unroll_len=5,
    unroll_share=0.7,
)
MAX_VOCABULARY = 16384  # tokens that a draft guesses at most
_GPU_ROWS = 4096  # windows that a GPU writes at a time


def recipe_for(
    target: str | Path,
    num_tokens: int,
    generated_share: float | None = None,
    num_generated_tokens: int | None = None,
    batch_tokens: int = DraftRecipe.batch_tokens,
) -> DraftRecipe:
    """``CHAT_RECIPE`` for a target with a chat template, else the shipped head's; raises ``ModelError``."""
    checkpoint = open_checkpoint(target)
    is_chat = Conversations.of(checkpoint.load_tokenizer(), checkpoint.name) is not None
    recipe = CHAT_RECIPE if is_chat else DraftRecipe()
    if num_generated_tokens is None:
        num_generated_tokens = num_tokens // 4 if is_chat else recipe.num_generated_tokens
    return replace(
        recipe,
        num_tokens=num_tokens,
        generated_share=recipe.generated_share if generated_share is None else generated_share,
        num_generated_tokens=num_generated_tokens,
        batch_tokens=batch_tokens,
    )


def train_draft(
    target: str | Path,
    out: Path,
    data: Sequence[Path],
    recipe: DraftRecipe,
    work_dir: Path,
    *,
    block: BlockShape | None = None,
    hints: HintRecipe | None = None,
    compiled: bool = False,
) -> None:
    """Train a head for ``target`` (as of ``open_checkpoint``) on the text files below ``data``, into ``out``.

    A target with a chat template converses with itself for the share of the text that it writes, and may do without
    ``data``. With ``hints``, hint heads too. Goes on from ``work_dir`` where an interrupted run with the same arguments
    left off, and with the hints alone where the head is finished. ``block``: a block head of this shape, instead of an
    EAGLE head. ``compiled``: faster, and needs a C++ compiler.
    Raises ``ModelError`` for a target and ``UsageError`` for data that cannot be used.
    """
    if block is not None and hints is not None:
        raise UsageError("hint heads go with EAGLE heads; train a block head without hints")
    checkpoint = open_checkpoint(target)
    tokenizer: Any = checkpoint.load_tokenizer()
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError(f"the tokenizer of {target} names no eos_token, which separates the texts; add it")
    plan = Conversations.of(tokenizer, checkpoint.name)
    tokens = _given_tokens(data, tokenizer)
    if not data and plan is None:
        raise UsageError(f"{target} has no chat template to converse by; name text files with --data")
    if not data and recipe.generated_share < 1:
        raise UsageError("without --data all text is the target's own; leave out --generated-share")
    opened = Target.open(target, compiled=compiled)
    if opened.device.type == "cuda":
        recipe = replace(recipe, generation_batch=_GPU_ROWS)
    if block is not None:
        trainee = train_block_head(opened, tokens, BlockRecipe(recipe, block), work_dir, out, plan=plan)
        trainee.save(out, level_rates(trainee, opened, *new_text(opened, tokens, recipe, plan)))
        return
    head = train_head(opened, tokens, recipe, work_dir, out, plan=plan, compiled=compiled)
    head.note_hit_rates(measure_steadiness(opened, head, tokens, recipe, plan))
    head.token_ids = draft_vocabulary(generate_windows(opened, tokens, recipe, work_dir / "generated", plan), opened)
    head.save(out)
    if hints is not None:
        train_hints(opened, tokens, hints, recipe, work_dir, out, plan=plan)


def draft_vocabulary(windows: Tokens, target: Target) -> Tensor | None:
    """The tokens that are worth a guess, [N] ascending: the most frequent ones of the target's text ``windows`` [R, T].

    Of those that it does not have, the first by id: a tokenizer's early merges are the frequent ones. ``None`` where
    the vocabulary is not much larger.
    """
    size = target.config.vocab_size
    if size < 2 * MAX_VOCABULARY:
        return None
    counts = torch.bincount(torch.from_numpy(windows).flatten().long(), minlength=size)
    return counts.argsort(descending=True, stable=True)[:MAX_VOCABULARY].sort().values


def _given_tokens(data: Sequence[Path], tokenizer: Any) -> Tokens:
    """int32 [T]; none without data."""
    if not data:
        return np.empty(0, np.int32)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    documents = read_documents(data)
    logger.info("reading %d texts", len(documents))
    return encode_documents(documents, encode, tokenizer.eos_token_id)
