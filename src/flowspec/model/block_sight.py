"""What the rows of a block see of the text and of each other, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspec.errors import ModelError, shortened
from flowspec.model.draft_files import DraftFiles


@dataclass(frozen=True)
class Sight:
    """Of one layer. All of the text, and all rows of the block, unless it is said."""

    window: int | None = None  # positions up to a row's own that it sees
    is_from_anchor: bool = False  # the window is as many positions before the anchor, for each of its rows
    is_causal: bool = False  # a row sees no row behind it

    def start(self, num_text: int) -> int:
        """The first of the text's rows that any row of the block sees."""
        return 0 if self.window is None else max(0, num_text - self.window)

    def mask(self, num_text: int, num_rows: int, device: torch.device) -> Tensor | None:
        """Bool [rows, text from ``start`` on, and rows], true where a row sees; ``None``: everywhere."""
        if not self.is_causal and (self.window is None or num_text + num_rows <= self.window):
            return None
        keys = torch.arange(self.start(num_text), num_text + num_rows, device=device)
        rows = torch.arange(num_text, num_text + num_rows, device=device)[:, None]
        sees = torch.ones(num_rows, len(keys), dtype=torch.bool, device=device)
        if self.window is not None and not self.is_from_anchor:
            sees &= rows - keys < self.window
        return sees & (keys <= rows) if self.is_causal else sees


def read_sights(files: DraftFiles, config: Any, is_causal: Any, is_from_anchor: bool) -> tuple[Sight, ...]:
    """Of a head's layers. ``config``: transformers', of the layers; ``is_causal``: what the file says of all of them.

    Else those that slide are causal, unless ``sliding_window_non_causal`` is true. Raises ``ModelError``.
    """
    if not (is_causal is None or isinstance(is_causal, bool)):
        raise ModelError(f"{files.config_path}: causal is {shortened(repr(is_causal), 40)}; it must be true or false")
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sights = []
    for kind in types[: config.num_hidden_layers]:
        slides = kind == "sliding_attention"
        window = getattr(config, "sliding_window", None) if slides else None
        if slides and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ModelError(
                f"{files.config_path}: the head's attention slides, but sliding_window and use_sliding_window say no "
                "window; mend them as they were when the head was trained"
            )
        by_kind = slides and not files.config.get("sliding_window_non_causal")
        sights.append(Sight(window, slides and is_from_anchor, by_kind if is_causal is None else is_causal))
    return tuple(sights)
