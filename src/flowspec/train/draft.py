"""Trains all that a draft directory holds, the draft head and its hints, on text files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from flowspec.errors import ModelError
from flowspec.model.loader import Checkpoint
from flowspec.train.corpus import encode_documents, read_documents
from flowspec.train.eagle import DraftRecipe, Target, train_head
from flowspec.train.evaluate import measure_steadiness
from flowspec.train.hints import HintRecipe, train_hints

logger = logging.getLogger("flowspec.train")


def train_draft(
    target: str | Path,
    out: Path,
    data: Sequence[Path],
    recipe: DraftRecipe,
    work_dir: Path,
    *,
    hints: HintRecipe | None = None,
    compiled: bool = False,
) -> None:
    """Train a head for ``target`` (a directory, a hub name or ``demo``) on the text files below ``data``, into ``out``.

    With ``hints``, hint heads too. Goes on from ``work_dir`` where an interrupted run with the same arguments left off,
    and with the hints alone where the head is finished. ``compiled``: faster, and needs a C++ compiler. Raises
    ``ModelError`` for a target and ``UsageError`` for data that cannot be used.
    """
    tokenizer = Checkpoint.open(target).load_tokenizer()
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError(f"the tokenizer of {target} names no eos_token, which separates the texts; add it")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    documents = read_documents(data)
    logger.info("reading %d texts", len(documents))
    tokens = encode_documents(documents, encode, tokenizer.eos_token_id)
    opened = Target.open(target, compiled=compiled)
    head = train_head(opened, tokens, recipe, work_dir, out, compiled=compiled)
    head.note_hit_rates(measure_steadiness(opened, head, tokens, recipe))
    head.save(out)
    if hints is not None:
        train_hints(opened, tokens, hints, recipe, work_dir, out)
