"""What some options' texts mean."""

from __future__ import annotations

from flowspec.errors import UsageError


def logit_bias(text: str) -> tuple[int, float]:
    """Of one ``--logit-bias``. Raises ``UsageError``."""
    token_id, _, bias = text.partition(":")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise UsageError(f"--logit-bias {text!r} is not ID:BIAS, as in 198:-100") from None


def draft_layers(text: str | None) -> list[int] | None:
    """Of ``--draft-layers``. Raises ``UsageError``."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--draft-layers {text!r} is no list of layers, as in 2,16,29")
    return [int(part) for part in parts]
