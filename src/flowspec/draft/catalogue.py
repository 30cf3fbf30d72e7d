"""From what a user says of the draft to a draft source."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from flowspec.core import DType
from flowspec.draft.base import DraftSource
from flowspec.draft.eagle import EagleSource
from flowspec.draft.ngram import NgramSource
from flowspec.errors import UsageError
from flowspec.model.eagle_head import EagleHead
from flowspec.model.loader import DEMO, Checkpoint, demo_draft_directory
from flowspec.model.target_head import TargetHead

# A head's directory, or the caller's own source.
ChosenDraft: TypeAlias = Literal["none", "ngram"] | Path | DraftSource


def choose_draft(checkpoint: Checkpoint, draft: str | Path | DraftSource) -> ChosenDraft:
    """Find what is meant, without loading it; ``auto`` is the head that belongs to the model, else n-grams.

    Raises ``UsageError``.
    """
    if not isinstance(draft, (str, Path)):
        return draft
    match str(draft):
        case "none":
            return "none"
        case "ngram":
            return "ngram"
        case "auto":
            own = demo_draft_directory() if checkpoint.name == DEMO else Path(checkpoint.name) / "draft"
            return own if (own / "config.json").is_file() else "ngram"
        case name:
            directory = Path(name).expanduser()
            if not directory.is_dir():
                raise UsageError(f"no draft head in {name!r}; give its directory, or one of auto, none, ngram")
            return directory


def load_draft(
    chosen: ChosenDraft,
    checkpoint: Checkpoint,
    head: TargetHead,
    top_k: int,
    dtype: DType,
    device: str,
    is_coupled: bool = True,
) -> DraftSource | None:
    """``None`` when nothing is to be drafted. ``is_coupled``: see ``EagleSource``."""
    match chosen:
        case "none":
            return None
        case "ngram":
            return NgramSource()
        case Path():
            embedding = checkpoint.load_embedding(dtype, device)
            return EagleSource(EagleHead.load(chosen, embedding, dtype, device), head, top_k, is_coupled)
        case _:
            return chosen
