"""P-EAGLE's published checkpoints (arXiv 2602.01469): EAGLE-3's, with usually four layers, and what stands for nothing.

Tensors beside those of ``model.eagle3_format``: ``mask_hidden``, n H numbers, which rows of the levels below the first
have in place of the target's streams. Their token is ``mask_token_id`` (speculators, SpecForge), ``pard_token`` or
``ptd_token_id`` (Amazon). How many levels it was trained for is in speculators' ``speculators_config`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspec.errors import ModelError, shortened
from flowspec.model.draft_files import DraftFiles
from flowspec.model.eagle3_format import MASK_HIDDEN, Eagle3Format
from flowspec.model.head_tensors import TargetSizes
from flowspec.model.taps import Taps, TapSum, TorchLinear

_TOKEN_NAMES = ("mask_token_id", "pard_token", "ptd_token_id")
LEVELS, MOST_LEVELS = 8, 64  # what speculators and SpecForge train, unless told otherwise; none has more than 18


@dataclass(frozen=True)
class PEagleFormat(Eagle3Format):
    """A P-EAGLE checkpoint that has been looked through."""

    kind = "P-EAGLE"

    mask_token_id: int
    num_levels: int  # that one pass guesses

    @classmethod
    def _fields(cls, files: DraftFiles, target: TargetSizes, draft_layers: Sequence[int] | None) -> dict[str, Any]:
        fields = super()._fields(files, target, draft_layers)
        mask_token_id = _mask_token_id(files, target.vocab_size)
        return fields | {"mask_token_id": mask_token_id, "num_levels": _num_levels(files)}

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        num = len(self.layer_ids) * self.target_size
        if self.shape(MASK_HIDDEN) not in ((num,), (1, num)):
            self.require(MASK_HIDDEN, (1, 1, num))

    def mask_sum(self) -> Tensor:
        """What the stages would add up for a row of masks, float32 [1, width]."""
        streams = self.tensor(MASK_HIDDEN).float().view(len(self.layer_ids), self.target_size)
        blocks = {layer: TorchLinear(self.block(layer, torch.float32), "cpu") for layer in self.layer_ids}
        total = TapSum(Taps(self.taps, blocks, torch.float32, False), None)
        for layer in self.taps.layers:
            total(layer, streams[self.layer_ids.index(layer)][None])
        assert total.total is not None, "a head reads one layer at least"
        return total.total


def _mask_token_id(files: DraftFiles, vocab_size: int) -> int:
    value = next((files.config[name] for name in _TOKEN_NAMES if files.config.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        told = "is missing" if value is None else f"is {shortened(repr(value), 40)}"
        raise ModelError(
            f"{files.config_path}: mask_token_id {told}; it must be a token of the target, 0..{vocab_size - 1}: fetch "
            "the head again, or give one for this target"
        )
    return value


def _num_levels(files: DraftFiles) -> int:
    """As many tokens as its makers propose at once."""
    told: Any = files.config.get("speculators_config")
    methods = told.get("proposal_methods") if isinstance(told, dict) else None
    numbers = [method.get("speculative_tokens") for method in methods or [] if isinstance(method, dict)]
    value = next((number for number in numbers if number is not None), LEVELS)
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= MOST_LEVELS:
        raise ModelError(
            f"{files.config_path}: speculative_tokens is {shortened(repr(value), 40)}; it must be a whole number in "
            f"2..{MOST_LEVELS}"
        )
    return value
