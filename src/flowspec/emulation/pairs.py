"""The models behind a simulation, and their drafts; here is the pair without weights."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

from flowspec.core import TapShape
from flowspec.draft.base import DraftSource
from flowspec.draft.synthetic import SyntheticSource
from flowspec.model.hint_head import HINT_DEPTH
from flowspec.model.stage import Stage
from flowspec.model.synthetic import VOCAB_SIZE, SyntheticHead, SyntheticHinter, SyntheticStage, language, quality
from flowspec.model.taps import Taps
from flowspec.model.target_head import LogitsHead
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

    @property
    def taps(self) -> TapShape | None:
        """What the stages add up for the draft; ``None``: nothing."""
        ...

    def make_taps(self, index: int, num_stages: int) -> Taps | None:
        """What worker ``index`` of so many adds."""
        ...

    def encode(self, prompt: str) -> tuple[int, ...]: ...


class SyntheticPair:
    """``model.synthetic``: no weights, thousands of tokens in seconds."""

    def __init__(self, draft_quality: str, is_sampled: bool = False) -> None:
        """``is_sampled``: for temperatures above 0. Raises ``UsageError`` for an unknown quality."""
        spoken = language(quality(draft_quality, is_sampled), is_sampled)
        self.head = SyntheticHead(spoken)
        self.source = SyntheticSource(spoken)
        self.max_positions = 1 << 20
        self.eos_ids: frozenset[int] = frozenset()
        self.taps: TapShape | None = None

    def make_stages(self, num_stages: int) -> Sequence[Stage]:
        return [SyntheticStage(i == 0, i == num_stages - 1) for i in range(num_stages)]

    def make_hinter(self, index: int, num_stages: int) -> Hinter | None:
        depth = index / num_stages
        return SyntheticHinter(self.source.language, depth) if HINT_DEPTH <= depth < 1 else None

    def make_taps(self, index: int, num_stages: int) -> Taps | None:
        return None

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Another text for another prompt."""
        random = Random(prompt)
        return tuple(random.randrange(VOCAB_SIZE) for _ in range(PROMPT_LEN))
