"""What the driver itself loads of a model: tokenizer and template, lm_head, draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowspec.chat_template import ChatTemplate
from flowspec.core import DraftDType, DType, Weights
from flowspec.draft.base import DraftSource
from flowspec.draft.catalogue import ChosenDraft, load_draft
from flowspec.model.backends import load_head
from flowspec.model.head_tensors import HeadTensors
from flowspec.model.loader import Checkpoint
from flowspec.model.target_head import LogitsHead
from flowspec.text import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DriverModel:
    """The driver's share of a model; the layers are the workers'."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    chat_template: ChatTemplate
    turn_end_ids: frozenset[int]  # tokens that end an answer
    head: LogitsHead
    source: DraftSource | None  # ``None``: nothing is drafted

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        draft: ChosenDraft,
        dtype: DType = "float32",
        device: str = "cpu",
        draft_dtype: DraftDType = "auto",
        weights: Weights = "float",
        taps: HeadTensors | None = None,
    ) -> DriverModel:
        """``taps``: what ``draft.catalogue.read_taps`` has found.

        Raises ``ModelError`` and ``UsageError`` for files that cannot be used.
        """
        tokenizer = checkpoint.load_tokenizer()
        template = ChatTemplate(tokenizer, checkpoint.title)
        head = load_head(checkpoint, dtype, weights, device)
        source = load_draft(draft, checkpoint, head, dtype, device, draft_dtype=draft_dtype, weights=weights, taps=taps)
        # Configs, tokenizer and template of a fine-tune often say different ones.
        own = tokenizer.eos_token_id
        ends = checkpoint.all_eos_token_ids | template.end_ids | ({own} if isinstance(own, int) else frozenset())
        return cls(checkpoint, tokenizer, Vocabulary(tokenizer), template, ends, head, source)
