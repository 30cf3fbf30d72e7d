"""The models behind a simulation, and their drafts: a language without weights, or a real pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Protocol

from flowspec.core import DraftDType, Partition
from flowspec.draft.base import DraftSource
from flowspec.draft.catalogue import choose_draft, load_draft
from flowspec.draft.synthetic import SyntheticSource
from flowspec.errors import UsageError
from flowspec.model.hint_head import HINT_DEPTH, load_hinter
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import Stage
from flowspec.model.synthetic import VOCAB_SIZE, Language, SyntheticHead, SyntheticHinter, SyntheticStage, quality
from flowspec.model.target_head import LogitsHead, TargetHead
from flowspec.model.torch_stage import TorchStage
from flowspec.worker.hints import Hinter

PROMPT_LEN = 64  # tokens of a synthetic prompt


class ModelPair(Protocol):
    """The models behind a simulation: they give the tokens, and cost nothing."""

    @property
    def head(self) -> LogitsHead: ...

    @property
    def source(self) -> DraftSource | None: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def make_stages(self, num_stages: int) -> Sequence[Stage]:
        """Stages for one request; weights may be shared."""
        ...

    def make_hinter(self, index: int, num_stages: int) -> Hinter | None:
        """What worker ``index`` of so many guesses with, if it gives hints."""
        ...

    def encode(self, prompt: str) -> tuple[int, ...]: ...


class SyntheticPair:
    """``model.synthetic``: no weights, thousands of tokens in seconds."""

    def __init__(self, draft_quality: str, is_sampled: bool = False) -> None:
        """``is_sampled``: for temperatures above 0. Raises ``UsageError`` for an unknown quality."""
        language = Language(quality(draft_quality, is_sampled), is_sampled)
        self.head = SyntheticHead(language)
        self.source = SyntheticSource(language)
        self.max_positions = 1 << 20
        self.eos_ids: frozenset[int] = frozenset()

    def make_stages(self, num_stages: int) -> Sequence[Stage]:
        return [SyntheticStage(i == 0, i == num_stages - 1) for i in range(num_stages)]

    def make_hinter(self, index: int, num_stages: int) -> Hinter | None:
        depth = index / num_stages
        return SyntheticHinter(self.source.language, depth) if HINT_DEPTH <= depth < 1 else None

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Another text for another prompt."""
        random = Random(prompt)
        return tuple(random.randrange(VOCAB_SIZE) for _ in range(PROMPT_LEN))


class CheckpointPair:
    """A real model and draft, as the demo pair, cut as evenly as its layers allow."""

    def __init__(self, model: str, draft: str, is_coupled: bool = True, draft_dtype: DraftDType = "auto") -> None:
        """``is_coupled``: see ``draft.eagle.EagleSource``. Raises ``UsageError`` for what cannot be loaded."""
        self.checkpoint = Checkpoint.open(model)
        head = TargetHead(self.checkpoint.load_lm_head("float32", "cpu"))
        chosen = choose_draft(self.checkpoint, draft, draft_dtype)
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
