"""Tiny random P-EAGLE checkpoints in the published forms, and the published arithmetic written out once more.

The arithmetic is plain torch after arXiv 2602.01469, for one text, and shares nothing with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny_eagle3
from tiny_dflash import write_head
from tiny_eagle3 import TARGET, VOCAB, Eagle3Form

MASK = VOCAB - 1


@dataclass
class PEagleForm(Eagle3Form):
    """Which of the published forms."""

    dialect: str = "speculators"  # speculators, specforge, amazon
    num_layers: int = 2
    num_draft: int | None = None
    own_embedding: bool = True
    num_levels: int = 8


def write_peagle(directory: Path, form: PEagleForm | None = None, seed: int = 1, **more: Tensor) -> dict[str, Tensor]:
    """As ``write_dflash``."""
    form = form or PEagleForm()
    weights = make_weights(form, seed)
    names = {name: name.replace("layers.0.", "midlayer.") if form.dialect == "amazon" else name for name in weights}
    stored = {names[name]: tensor for name, tensor in weights.items()}
    write_head(directory, stored, make_config(form) | form.config, more)
    return weights


def make_weights(form: PEagleForm, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 200)
    shape = (1, 1) if form.dialect == "speculators" else (1,)
    hidden = torch.randn(*shape, len(form.tapped) * TARGET, generator=generator)
    return {**tiny_eagle3.make_weights(form, seed), "mask_hidden": hidden}


def make_config(form: PEagleForm) -> dict[str, Any]:
    if form.dialect == "speculators":
        config = tiny_eagle3.make_config(form)
        methods = [{"proposal_type": "greedy", "speculative_tokens": form.num_levels}]
        told = {**config["speculators_config"], "algorithm": "peagle", "proposal_methods": methods}
        own = {"architectures": ["PEagleSpeculator"], "speculators_model_type": "peagle", "mask_token_id": MASK}
        return {**config, **own, "speculators_config": told}
    config = tiny_eagle3.make_config(replace(form, dialect="specforge"))
    if form.dialect == "specforge":
        return {**config, "architectures": ["PEagleDraftModel"], "mask_token_id": MASK}
    return {**config, "ptd_token_id": MASK}


class Reference(tiny_eagle3.Reference):
    """A head as its paper describes it."""

    form: PEagleForm

    def guesses(self, streams: list[Tensor], token_ids: list[int]) -> Tensor:
        """[levels, V]. ``streams`` [T, H] each, of a text; ``token_ids`` [T]: behind each of it, the root last."""
        num_masks = self.form.num_levels - 1
        nothing = list(self.weights["mask_hidden"].view(len(streams), 1, -1))
        features = torch.cat([self.fused(streams), self.fused(nothing).expand(num_masks, -1)])
        states = self.states(torch.tensor([*token_ids, *[MASK] * num_masks]), features)
        return self.logits(states)[-self.form.num_levels :]
