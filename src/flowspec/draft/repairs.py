"""What would mend a draft head that guesses badly: simple mistakes are undone, one at a time, to see which it was.

A head's file does not tell whether its switches are those that it was trained with; its guesses do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from flowspec.draft.acceptance import Acceptance, ReadText, measure
from flowspec.draft.base import DraftSource
from flowspec.draft.dflash import DFlashSource
from flowspec.draft.eagle import EagleSource
from flowspec.model.dflash_head import DFlashHead
from flowspec.model.eagle3_head import Eagle3Head


def find_repair(
    source: DraftSource, text: ReadText, is_good: Callable[[Acceptance], bool], is_late: Callable[[], bool]
) -> str:
    """What has to be said of the head's mistake; empty where nothing simple mends it.

    The head is as before when this returns; meanwhile nothing else may use it.
    """
    if isinstance(source, (EagleSource, DFlashSource)):
        for told, change, read in _repairs(source, text):
            with change:
                if is_good(measure(source, read, is_late)):
                    return told
    return ""


def _repairs(
    source: EagleSource | DFlashSource, text: ReadText
) -> Iterator[tuple[str, AbstractContextManager[None], ReadText]]:
    head: Any = source.head
    if isinstance(head, Eagle3Head):
        names = (
            ("norm_before_residual",) if isinstance(source, DFlashSource) else ("norm_before_residual", "norm_output")
        )
        for name in names:
            owner = head.layers[0] if name == "norm_before_residual" else head
            now = str(not getattr(owner, name)).lower()
            yield f"With {name} {now} it guesses well: say so in its config", _flipped(owner, name), text
    if isinstance(head, DFlashHead) and not getattr(head, "is_recurrent", False):
        now = str(head.num_levels < head.block_size).lower()
        yield f"With sample_from_anchor {now} it guesses well: say so in its config", _anchor_flipped(source), text
    assert text.features is not None, "heads read features"
    for shift, place in ((1, "before"), (-1, "behind")):
        rolled = replace(text, features=torch.roll(text.features, shift, dims=0))
        told = (
            f"It guesses well with the features of the token {place} in each one's place: it was trained one token off"
        )
        yield told, nullcontext(), rolled


@contextmanager
def _anchor_flipped(source: Any) -> Iterator[None]:
    """The first row of a block guesses what the second one did, or the other way."""
    head, num_levels = source.head, source.head.num_levels
    head.num_levels = source.block_len = 2 * head.block_size - 1 - num_levels
    try:
        yield
    finally:
        head.num_levels = source.block_len = num_levels


@contextmanager
def _flipped(owner: Any, name: str) -> Iterator[None]:
    value = getattr(owner, name)
    setattr(owner, name, not value)
    try:
        yield
    finally:
        setattr(owner, name, value)
