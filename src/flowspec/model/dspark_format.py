"""DSpark's published checkpoints (arXiv 2607.05147): a DFlash head, and two small ones behind it.

Tensors beside DFlash's: ``markov_head.markov_w1.weight`` [V, r], by the token above a row;
``markov_head.markov_w2.weight`` [N, r], which makes of it what is added to the row's logits over the draft's N tokens;
``gate_proj`` [r, D + r] or ``joint_proj`` [3 r, 2 r + D] of the gated and the recurrent variant, with biases;
``confidence_head.proj.weight`` [1, D] or [1, D + r], and ``.bias`` [1].

| what | speculators | SpecForge | its authors (DeepSpec) |
|---|---|---|---|
| marked by | the container | ``projector_type`` in ``dflash_config`` | ``architectures`` |
| ``markov_rank`` and other sizes | top | ``dflash_config`` | top |
| embedding and lm_head | the target's | the target's | in the file |
| row 0 guesses | ``sample_from_anchor``, or always | always | always |

The tensors decide which of the two heads there are, and which variant it is. The authors' DFlash heads have neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowspec.errors import ModelError
from flowspec.model.dflash_format import DFlashFormat, block_value
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_tensors import HEAD, SUPPORTED, TargetSizes

_W1, _W2 = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
_CONFIDENCE = "confidence_head.proj.weight"
Variant = Literal["vanilla", "gated", "rnn"]


@dataclass(frozen=True)
class DSparkFormat(DFlashFormat):
    """A DSpark checkpoint that has been looked through."""

    kind = "DSpark"

    rank: int  # r; 0: no Markov head
    variant: Variant
    num_known: int  # N
    has_confidence: bool
    confidence_reads_token: bool

    @classmethod
    def _fields(cls, files: DraftFiles, target: TargetSizes, draft_layers: Sequence[int] | None) -> dict[str, Any]:
        fields = super()._fields(files, target, draft_layers)
        shapes = {name: files.shapes[own] for name, own in fields["names"].items()}
        return fields | {
            "samples_anchor": block_value(files, "sample_from_anchor") is not False,
            "rank": _columns(shapes.get(_W1)),
            "variant": _variant(shapes),
            "num_known": (shapes.get(HEAD) or (target.vocab_size,))[0],
            "has_confidence": _CONFIDENCE in shapes,
            "confidence_reads_token": _columns(shapes.get(_CONFIDENCE)) > fields["config"].hidden_size,
        }

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        if self.rank or _W2 in self.names:
            self.require(_W1, (vocab_size, self.rank))
            self.require(_W2, (self.num_known, self.rank))
        self.check_said("markov_rank", self.rank)
        if self.variant == "rnn" and not self.samples_anchor:
            raise ModelError(
                f"{self.files.path} has a recurrent Markov head and rows that guess from the second one on: programs "
                f"differ in where it begins, and it is not supported; {SUPPORTED}"
            )
        if self.rank:
            self.check_said("markov_head_type", self.variant)
        self.check_said("enable_confidence_head", self.has_confidence)
        if self.has_confidence:
            if self.confidence_reads_token and not self.rank:
                raise self.lacks([_W1])
            self.check_said("confidence_head_with_markov", self.confidence_reads_token)


def _variant(shapes: dict[str, tuple[int, ...]]) -> Variant:
    if "markov_head.gate_proj.weight" in shapes:
        return "gated"
    return "rnn" if "markov_head.joint_proj.weight" in shapes else "vanilla"


def _columns(shape: tuple[int, ...] | None) -> int:
    return shape[-1] if shape else 0
