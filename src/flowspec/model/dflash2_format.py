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

from flowspec.errors import ModelError
from flowspec.model.dflash_format import DFlashFormat, block_value, positive_number, read_block_parts, whole_number
from flowspec.model.draft_files import DraftFiles

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
    def read(
        cls,
        files: DraftFiles,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        draft_layers: Sequence[int] | None = None,
    ) -> DFlash2Format:
        """As ``Eagle3Format.read``."""
        parts = read_block_parts(files, num_layers, hidden_size, vocab_size, draft_layers)
        shapes = {name: files.shapes[own] for name, own in parts["names"].items()}
        width, kernel, projection = parts["config"].hidden_size, shapes.get(_KERNEL, ()), shapes.get(_PROJECTION, ())
        num_taps = kernel[1] if len(kernel) == 3 else 0
        num_groups = projection[0] // (2 * num_taps) if projection and num_taps else 0
        found = cls(
            **parts,
            samples_anchor=block_value(files, "sample_from_anchor") is True,
            num_taps=num_taps,
            group_size=width // num_groups if num_groups else 0,
            rank=(*shapes.get(_SUCCESSORS, ()), 0, 0)[1],
            num_candidates=whole_number(files, "selector_top_k", 2, vocab_size),
            output_multiplier=positive_number(files, "output_multiplier") or 1.0,
            softcap=positive_number(files, _SOFTCAP) if block_value(files, _SOFTCAP) else None,
        )
        found.check_block(vocab_size)
        for name in (_KERNEL, _PROJECTION, _SUCCESSORS):
            if name not in found.names:
                raise found.lacks([name])
        if found.token_ids(vocab_size) is not None or found.group_size < 1 or width % found.group_size:
            raise ModelError(
                f"{files.path}: its convolutions or its vocabulary are no DFlash2 head's (groups that share out a row, "
                "all of the target's tokens); fetch the head again"
            )
        for name, value in (
            ("conv_kernel_size", num_taps),
            ("conv_group_size", found.group_size),
            ("selector_rank", found.rank),
        ):
            found.check_said(name, value)
        return found
