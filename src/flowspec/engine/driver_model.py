"""What the driver itself loads of a model: tokenizer and template, lm_head, draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowspec.chat_template import ChatTemplate
from flowspec.core import DraftDType, DType, Weights
from flowspec.draft.base import DraftSource
from flowspec.draft.catalogue import ChosenDraft, load_draft
from flowspec.draft.memory import Memory
from flowspec.draft.remote_passes import Port
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
    memory: Memory | None = None  # of earlier requests' texts, for look-ups

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
        memory_tokens: int = 0,
        port: Port | None = None,
    ) -> DriverModel:
        """``taps``: what ``draft.catalogue.read_taps`` has found. ``memory_tokens``: see ``EngineConfig``.

        ``port``: to the worker that the draft is on, if it is not to be loaded here.

        Raises ``ModelError`` and ``UsageError`` for files that cannot be used.
        """
        tokenizer = checkpoint.load_tokenizer()
        template = ChatTemplate(tokenizer, checkpoint.title)
        head = load_head(checkpoint, dtype, weights, device)
        memory = Memory(memory_tokens) if memory_tokens and draft != "none" else None
        how = dtype, device, True, draft_dtype, weights, taps
        source = load_draft(draft, checkpoint, head, *how, memory=memory, port=port)
        # Configs, tokenizer and template of a fine-tune often say different ones.
        own = tokenizer.eos_token_id
        ends = checkpoint.all_eos_token_ids | template.end_ids | ({own} if isinstance(own, int) else frozenset())
        return cls(checkpoint, tokenizer, Vocabulary(tokenizer), template, ends, head, source, memory)
