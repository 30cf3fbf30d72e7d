"""A real pair behind a simulation. Simulations without one do not load this module, nor transformers with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowspec.chat_template import ChatTemplate
from flowspec.core import DraftDType, Partition, TapShape, Weights
from flowspec.draft.catalogue import choose_draft, load_draft, read_taps
from flowspec.errors import UsageError
from flowspec.model.backends import choose_weights, load_head, load_stage, open_checkpoint, stage_taps
from flowspec.model.hint_head import load_hinter
from flowspec.model.stage import Stage
from flowspec.model.taps import Taps
from flowspec.worker.hints import Hinter


class CheckpointPair:
    """A real model and draft, as the demo pair, cut as evenly as its layers allow."""

    def __init__(self, model: str, draft: str, is_coupled: bool = True, draft_dtype: DraftDType = "auto") -> None:
        """``is_coupled``: see ``draft.eagle.EagleSource``. Raises ``UsageError`` for what cannot be loaded."""
        self.checkpoint = open_checkpoint(model)
        self.weights: Weights = choose_weights(self.checkpoint, "auto", "cpu")
        chosen = choose_draft(self.checkpoint, draft, draft_dtype)
        self.head = load_head(self.checkpoint, "float32", self.weights, "cpu")
        self.form = read_taps(chosen, self.checkpoint)
        how = is_coupled, draft_dtype, self.weights, self.form
        self.source = load_draft(chosen, self.checkpoint, self.head, "float32", "cpu", *how)
        self.max_positions = self.checkpoint.max_positions
        self.eos_ids = self.checkpoint.eos_token_ids
        self._tokenizer = self.checkpoint.load_tokenizer()
        self._template = ChatTemplate(self._tokenizer, self.checkpoint.title)
        self._stages: dict[int, list[Stage]] = {}
        self.draft_directory = chosen if isinstance(chosen, Path) else None
        self._hinters: dict[tuple[int, int], Hinter | None] = {}

    def make_stages(self, num_stages: int) -> Sequence[Stage]:
        if num_stages not in self._stages:
            self._stages[num_stages] = [
                load_stage(self.checkpoint, layers, "float32", self.weights, "cpu")
                for layers in self.partition(num_stages).stages
            ]
        return self._stages[num_stages]

    def make_hinter(self, index: int, num_stages: int) -> Hinter | None:
        if self.draft_directory is None:
            return None
        if (index, num_stages) not in self._hinters:
            end = self.partition(num_stages).stages[index - 1].end
            self._hinters[index, num_stages] = load_hinter(self.draft_directory, self.checkpoint, end, "float32", "cpu")
        return self._hinters[index, num_stages]

    @property
    def taps(self) -> TapShape | None:
        return None if self.form is None else self.form.taps

    def tap_block(self, layer: int) -> Tensor:
        """What the draft's first matrix multiplies the stream by that enters a layer, [D, H]."""
        assert self.form is not None, "nobody asks for it"
        return self.form.block(layer, torch.float32)

    def make_taps(self, index: int, num_stages: int) -> Taps | None:
        if self.taps is None:
            return None
        layers = self.partition(num_stages).stages[index - 1]
        return stage_taps(self.taps, layers, index == num_stages, self.tap_block, "float32", self.weights, "cpu")

    def partition(self, num_stages: int) -> Partition:
        """Raises ``UsageError`` for more stages than layers."""
        name, num_layers = self.checkpoint.name, self.checkpoint.num_layers
        if num_stages > num_layers:
            raise UsageError(f"{name} has {num_layers} layers, too few for {num_stages} stages; use --model synthetic")
        return Partition.even(num_layers, num_stages)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """A question, for a model that chats."""
        if self._template.is_there:
            prompt_ids = tuple(self._template.encode([{"role": "user", "content": prompt}]))
        else:
            prompt_ids = tuple(self._tokenizer(prompt, verbose=False).input_ids)
        if not 0 < len(prompt_ids) < self.max_positions:
            raise UsageError(
                f"a prompt has {len(prompt_ids)} tokens; the model has room for 1 to {self.max_positions - 1}"
            )
        return prompt_ids
