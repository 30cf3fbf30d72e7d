"""DFlash2's published checkpoints: DFlash's, with short convolutions in the block, and a selector of its guesses.

Tensors beside DFlash's: ``layers.i.attention_conv`` and ``layers.i.mlp_conv``, each with ``base_kernel`` [2, taps, D]
and ``kernel_projection.weight`` [2 taps groups, D]; ``candidate_selector`` with ``predecessor_codebook`` and
``successor_codebook`` [V, r], and ``hidden_projection.weight`` [r, D]. ``selector_top_k`` candidates of a level are
scored; ``output_multiplier`` and ``final_logit_softcapping`` change the logits before. The authors (z-lab) write all of
these into ``dflash_config``, speculators at the top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowspec.errors import ModelError
from flowspec.model.dflash_format import DFlashFormat, block_value, positive_number, whole_number
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_tensors import TargetSizes

_KERNEL, _PROJECTION = "layers.0.attention_conv.base_kernel", "layers.0.attention_conv.kernel_projection.weight"
_SOFTCAP = "final_logit_softcapping"  # 0: none
_SUCCESSORS = "candidate_selector.successor_codebook"


@dataclass(frozen=True)
class DFlash2Format(DFlashFormat):
    """A DFlash2 checkpoint that has been looked through."""

    kind = "DFlash2"

    num_taps: int  # rows that a convolution reads, its own included
    group_size: int  # numbers of a row that share what changes a kernel
    rank: int
    num_candidates: int
    output_multiplier: float
    softcap: float | None

    @classmethod
    def _fields(cls, files: DraftFiles, target: TargetSizes, draft_layers: Sequence[int] | None) -> dict[str, Any]:
        fields = super()._fields(files, target, draft_layers)
        shapes = {name: files.shapes[own] for name, own in fields["names"].items()}
        width, kernel, projection = fields["config"].hidden_size, shapes.get(_KERNEL, ()), shapes.get(_PROJECTION, ())
        num_taps = kernel[1] if len(kernel) == 3 else 0
        num_groups = projection[0] // (2 * num_taps) if projection and num_taps else 0
        return fields | {
            "num_taps": num_taps,
            "group_size": width // num_groups if num_groups else 0,
            "rank": (*shapes.get(_SUCCESSORS, ()), 0, 0)[1],
            "num_candidates": whole_number(files, "selector_top_k", 2, target.vocab_size),
            "output_multiplier": positive_number(files, "output_multiplier") or 1.0,
            "softcap": positive_number(files, _SOFTCAP) if block_value(files, _SOFTCAP) else None,
        }

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        for name in (_KERNEL, _PROJECTION, _SUCCESSORS):
            if name not in self.names:
                raise self.lacks([name])
        size = self.group_size
        if self.token_ids(vocab_size) is not None or size < 1 or self.config.hidden_size % size:
            raise ModelError(
                f"{self.files.path}: its convolutions or its vocabulary are no DFlash2 head's (groups that share out a "
                "row, all of the target's tokens); fetch the head again"
            )
        for name, value in (
            ("conv_kernel_size", self.num_taps),
            ("conv_group_size", size),
            ("selector_rank", self.rank),
        ):
            self.check_said(name, value)
