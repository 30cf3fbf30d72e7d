"""Trains all that a draft directory holds, the draft head and its hints, on given text and on the target's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowspec.errors import ModelError, UsageError
from flowspec.model.backends import open_checkpoint
from flowspec.train.block import BlockRecipe, BlockShape, level_rates, train_block_head
from flowspec.train.corpus import Tokens, encode_documents, read_documents
from flowspec.train.eagle import train_head
from flowspec.train.eagle3 import Eagle3Recipe, Eagle3Shape, train_eagle3_head
from flowspec.train.evaluate import measure_steadiness, new_text
from flowspec.train.frozen_target import Target
from flowspec.train.hints import HintRecipe, train_hints
from flowspec.train.own_text import Conversations
from flowspec.train.windows import DraftRecipe, generate_windows

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

AnyRecipe = TypeVar("AnyRecipe", DraftRecipe, BlockRecipe, Eagle3Recipe)


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
    shape: BlockShape | Eagle3Shape | None = None,
    hints: HintRecipe | None = None,
    compiled: bool = False,
) -> None:
    """Train a head for ``target`` (as of ``open_checkpoint``) on the text files below ``data``, into ``out``.

    A target with a chat template converses with itself for the share of the text that it writes, and may do without
    ``data``. With ``hints``, hint heads too. Goes on from ``work_dir`` where an interrupted run with the same arguments
    left off, and with the hints alone where the head is finished. ``shape``: of a block head or an EAGLE-3 head;
    without one, an EAGLE head. ``compiled``: faster, and needs a C++ compiler.
    Raises ``ModelError`` for a target and ``UsageError`` for data that cannot be used.
    """
    if isinstance(shape, BlockShape) and hints is not None:
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
    work = _Work(opened, tokens, recipe, work_dir, out, plan)
    match shape:
        case BlockShape():
            work.make_block_head(shape)
        case Eagle3Shape():
            work.make_eagle3_head(shape, compiled)
        case None:
            work.make_eagle_head(compiled)
    if hints is not None:
        train_hints(opened, tokens, hints, recipe, work_dir, out, plan=plan)


@dataclass(frozen=True)
class _Work:
    """What all kinds of heads are trained with, and how often the guesses of each are right on new text."""

    target: Target
    tokens: Tokens
    recipe: DraftRecipe
    work_dir: Path
    out: Path
    plan: Conversations | None

    def make_block_head(self, shape: BlockShape) -> None:
        head = train_block_head(*self._means(BlockRecipe(self.recipe, shape)), plan=self.plan)
        head.save(self.out, level_rates(head, self.target, *self._new_text()))

    def make_eagle3_head(self, shape: Eagle3Shape, compiled: bool) -> None:
        known = self._worth_a_guess(shape.num_tokens)
        means = self._means(Eagle3Recipe(self.recipe, shape))
        head = train_eagle3_head(*means, token_ids=known, plan=self.plan, compiled=compiled)
        token_ids, counted = self._new_text()
        streams, _ = self.target.tapped_streams(token_ids, head.tapped)
        rates = measure_steadiness(head.head, head.logits, token_ids, counted, head.read(streams))
        head.save(self.out, rates)

    def make_eagle_head(self, compiled: bool) -> None:
        head = train_head(*self._means(self.recipe), plan=self.plan, compiled=compiled)
        token_ids, counted = self._new_text()
        features = self.target.features(token_ids)
        head.note_hit_rates(measure_steadiness(head, self.target.logits, token_ids, counted, features))
        head.token_ids = self._worth_a_guess()
        head.save(self.out)

    def _means(self, recipe: AnyRecipe) -> tuple[Target, Tokens, AnyRecipe, Path, Path]:
        return self.target, self.tokens, recipe, self.work_dir, self.out

    def _new_text(self) -> tuple[Tensor, Tensor]:
        return new_text(self.target, self.tokens, self.recipe, self.plan)

    def _worth_a_guess(self, size: int | None = None) -> Tensor | None:
        """The most frequent tokens of the windows that are trained on."""
        generated = generate_windows(self.target, self.tokens, self.recipe, self.work_dir / "generated", self.plan)
        share = self.recipe.generated_share if len(generated) else 0.0
        num_all = self.target.config.vocab_size
        own, given = frequencies_of(generated, num_all), frequencies_of(self.tokens, num_all)
        return draft_vocabulary(share * own + (1 - share) * given, size)


def frequencies_of(text: Tokens, vocab_size: int) -> Tensor:
    """Of each token, as a share of the tokens [...]: float64 [V]."""
    counts = torch.bincount(torch.from_numpy(text).flatten().long(), minlength=vocab_size)
    return counts.double() / max(1, text.size)


def draft_vocabulary(frequencies: Tensor, size: int | None = None) -> Tensor | None:
    """The tokens that are worth a guess, [N] ascending: so many, the most frequent ones by ``frequencies`` [V].

    Of those that never occur, the first by id: a tokenizer's early merges are the frequent ones. Without a ``size``,
    ``MAX_VOCABULARY``; ``None``, which is all, where the vocabulary is not larger, or without a ``size`` not much.
    """
    num_all = len(frequencies)
    if size is None:
        size = MAX_VOCABULARY if num_all >= 2 * MAX_VOCABULARY else num_all
    if size >= num_all:
        return None
    return frequencies.argsort(descending=True, stable=True)[:size].sort().values


def _given_tokens(data: Sequence[Path], tokenizer: Any) -> Tokens:
    """int32 [T]; none without data."""
    if not data:
        return np.empty(0, np.int32)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    documents = read_documents(data)
    logger.info("reading %d texts", len(documents))
    return encode_documents(documents, encode, tokenizer.eos_token_id)
