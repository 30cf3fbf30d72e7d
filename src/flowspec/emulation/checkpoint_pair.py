"""A real pair behind a simulation. Simulations without one do not load this module, nor transformers with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowspec.core import DraftDType, Partition
from flowspec.draft.catalogue import choose_draft, load_draft
from flowspec.errors import UsageError
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_kind import NAMES, kind_of
from flowspec.model.hint_head import load_hinter
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import Stage
from flowspec.model.target_head import TargetHead
from flowspec.model.torch_stage import TorchStage
from flowspec.worker.hints import Hinter


class CheckpointPair:
    """A real model and draft, as the demo pair, cut as evenly as its layers allow."""

    def __init__(self, model: str, draft: str, is_coupled: bool = True, draft_dtype: DraftDType = "auto") -> None:
        """``is_coupled``: see ``draft.eagle.EagleSource``. Raises ``UsageError`` for what cannot be loaded."""
        self.checkpoint = Checkpoint.open(model)
        head = TargetHead(self.checkpoint.load_lm_head("float32", "cpu"))
        chosen = choose_draft(self.checkpoint, draft, draft_dtype)
        if isinstance(chosen, Path) and (kind := kind_of(DraftFiles(chosen))) != "eagle":
            raise UsageError(
                f"{chosen} is {NAMES[kind]}, which simulations and emulations do not run; give an EAGLE-1 or "
                "EAGLE-2 head, ngram or none, or measure in real time with bench"
            )
        if isinstance(chosen, Checkpoint):
            raise UsageError(
                f"{chosen.title} is a language model, which simulations and emulations do not draft with; give an "
                "EAGLE head, ngram or none, or measure in real time with bench"
            )
        self.head = head
        self.source = load_draft(chosen, self.checkpoint, head, "float32", "cpu", is_coupled, draft_dtype)
        self.max_positions = self.checkpoint.max_positions
        self.eos_ids = self.checkpoint.eos_token_ids
        self._tokenizer = self.checkpoint.load_tokenizer()
        self._stages: dict[int, list[TorchStage]] = {}
        self.draft_directory = chosen if isinstance(chosen, Path) else None
        self._hinters: dict[tuple[int, int], Hinter | None] = {}

    def make_stages(self, num_stages: int) -> Sequence[Stage]:
        if num_stages not in self._stages:
            self._stages[num_stages] = [
                TorchStage.load(self.checkpoint, layers, "float32", "cpu")
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

    def partition(self, num_stages: int) -> Partition:
        """Raises ``UsageError`` for more stages than layers."""
        name, num_layers = self.checkpoint.name, self.checkpoint.num_layers
        if num_stages > num_layers:
            raise UsageError(f"{name} has {num_layers} layers, too few for {num_stages} stages; use --model synthetic")
        return Partition.even(num_layers, num_stages)

    def encode(self, prompt: str) -> tuple[int, ...]:
        prompt_ids = tuple(self._tokenizer(prompt, verbose=False).input_ids)
        if not 0 < len(prompt_ids) < self.max_positions:
            raise UsageError(
                f"a prompt has {len(prompt_ids)} tokens; the model has room for 1 to {self.max_positions - 1}"
            )
        return prompt_ids
