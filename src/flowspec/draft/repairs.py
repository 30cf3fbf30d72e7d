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
from flowspec.draft.eagle import EagleSource
from flowspec.model.eagle3_head import Eagle3Head


def find_repair(
    source: DraftSource, text: ReadText, is_good: Callable[[Acceptance], bool], is_late: Callable[[], bool]
) -> str:
    """What has to be said of the head's mistake; empty where nothing simple mends it.

    The head is as before when this returns; meanwhile nothing else may use it.
    """
    if isinstance(source, EagleSource):
        for told, change, read in _repairs(source, text):
            with change:
                if is_good(measure(source, read, is_late)):
                    return told
    return ""


def _repairs(source: EagleSource, text: ReadText) -> Iterator[tuple[str, AbstractContextManager[None], ReadText]]:
    if isinstance(source.head, Eagle3Head):
        first: Any = source.head.layers[0]
        for owner, name in ((first, "norm_before_residual"), (source.head, "norm_output")):
            now = str(not getattr(owner, name)).lower()
            yield f"With {name} {now} it guesses well: say so in its config", _flipped(owner, name), text
    assert text.features is not None, "heads read features"
    for shift, place in ((1, "before"), (-1, "behind")):
        rolled = replace(text, features=torch.roll(text.features, shift, dims=0))
        told = (
            f"It guesses well with the features of the token {place} in each one's place: it was trained one token off"
        )
        yield told, nullcontext(), rolled


@contextmanager
def _flipped(owner: Any, name: str) -> Iterator[None]:
    value = getattr(owner, name)
    setattr(owner, name, not value)
    try:
        yield
    finally:
        setattr(owner, name, value)
