"""Plain values that every part shares: layer ranges, partitions, sampling parameters. No torch, no I/O."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Literal, NamedTuple

from flowspec.checked import checked_class
from flowspec.errors import FieldError, UsageError

DType = Literal["float32", "bfloat16", "float16"]
DraftCheck = Literal["on", "off"]  # of a draft head, before the first request
DraftDType = Literal["auto", "int8", "int4"]  # auto: the model's; int4: of small models alone
Weights = Literal["auto", "float", "int8", "int4"]  # of linear layers; float: in the dtype; auto: by the model's files
FinishReason = Literal["stop", "length"]


class Ending(Enum):
    """Why a request, or this run of it, goes on no more."""

    FINISHED = "finished"  # its text is complete
    CANCELLED = "cancelled"  # nobody wants more of it
    FAILED = "failed"  # it met an error
    PREEMPTED = "preempted"  # its caches went to others; it is started again behind what it has emitted


FINAL = -1  # in place of a layer's index: the hidden states behind the last layer and the final norm
MAX_SEED = 2**64 - 1
MAX_ROWS = 8192  # of a segment, and of what a request holds uncommitted at a worker: masks grow with their square
MAX_RUNNING = 1024  # requests at once
MAX_LOGPROBS = 20
MAX_STOPS = 16


@dataclass(frozen=True, order=True)
class LayerRange:
    """The half-open range ``[start, end)`` of transformer layers that one stage runs."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise UsageError(f"layer range {self.start}:{self.end} is empty or negative; write it as START:END")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True)
class Partition:
    """The layer ranges of all stages in pipeline order; they tile ``[0, num_layers)`` exactly."""

    stages: tuple[LayerRange, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError("a partition needs at least one stage")
        if self.stages[0].start != 0:
            raise UsageError(f"partition {self} starts at layer {self.stages[0].start}; it must start at layer 0")
        for left, right in pairwise(self.stages):
            if left.end != right.start:
                problem = "leaves a gap" if left.end < right.start else "overlaps"
                raise UsageError(f"partition {self} {problem} between {left} and {right}; ranges must join exactly")

    @property
    def num_layers(self) -> int:
        return self.stages[-1].end

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        return ",".join(str(stage) for stage in self.stages)

    @classmethod
    def even(cls, num_layers: int, num_stages: int) -> Partition:
        """Cut the layers into stages whose sizes differ by at most one; the longer ones come first."""
        if num_stages < 1:
            raise UsageError(f"{num_stages} stages: at least one is needed")
        if num_stages > num_layers:
            raise UsageError(f"{num_stages} stages, but the model has only {num_layers} layers; use fewer stages")
        size, num_longer = divmod(num_layers, num_stages)
        ends = [size * (i + 1) + min(i + 1, num_longer) for i in range(num_stages)]
        return cls(tuple(LayerRange(start, end) for start, end in zip([0, *ends], ends, strict=False)))

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read the command line's form, ``0:4,4:8``."""
        ranges: list[LayerRange] = []
        for part in text.split(","):
            start, colon, end = part.strip().partition(":")
            if not (colon and start.isdecimal() and end.isdecimal()):
                raise UsageError(f"partition {text!r}: {part!r} is no range; write ranges as START:END, as in 0:4,4:8")
            ranges.append(LayerRange(int(start), int(end)))
        return cls(tuple(ranges))

    def check_fits(self, num_layers: int) -> None:
        if self.num_layers != num_layers:
            raise UsageError(f"partition {self} covers {self.num_layers} layers, but the model has {num_layers}")


@dataclass(frozen=True)
class TapShape:
    """What the stages add up for a draft that reads several of the target's layers: one running sum, row by row.

    ``layers``, ascending: layer k stands for the stream that enters layer k, which layer k - 1 has put out; 0 is the
    embedding's output, the number of layers the last one's, before the final norm. Each of them is multiplied by its
    block of the draft's first matrix, and the products are added in this order.
    ``norm_eps``: the streams are RMS-normed first (without a weight: that is in the block).
    ``has_squares``: one more column adds up their mean squares, over all of them.
    """

    layers: tuple[int, ...]
    width: int  # of the sum, that column included
    norm_eps: float | None = None
    has_squares: bool = False

    @property
    def num_outputs(self) -> int:
        """Rows of a block."""
        return self.width - self.has_squares

    def of_stage(self, stage: LayerRange, is_last: bool) -> tuple[int, ...]:
        """Those that a stage adds: of the streams that enter its layers, and of the one behind the last layer."""
        end = stage.end + is_last
        return tuple(layer for layer in self.layers if stage.start <= layer < end)


class TensorEntry(NamedTuple):
    """One tensor, for a device that has none of the model's files."""

    name: str  # transformers' own
    kind: str  # of its numbers, as the files call it; empty: nobody needs to know
    shape: tuple[int, ...]
    num_bytes: int  # as it is stored
    sha256: str  # of these bytes, in hex; empty for those of other stages


class StageManifest(NamedTuple):
    """All that a device has to know of a model to fetch and to load one stage of it."""

    format: Literal["safetensors", "gguf"]
    config: bytes  # config.json as it is; or GGUF's metadata without its arrays, in msgpack
    revision: str  # at the hub; empty for files that nobody numbers
    tensors: list[TensorEntry]  # of the whole model
    hints: list[TensorEntry]  # of the draft's hint head behind the stage, as safetensors; empty: it gives none

    def wanted(self) -> list[TensorEntry]:
        """Of the stage, and of the hint head if there is one, each file content once."""
        return list({entry.sha256: entry for entry in [*self.tensors, *self.hints] if entry.sha256}.values())


@checked_class
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when a generation ends.

    Args:
        max_tokens: tokens to generate at most.
        temperature: 0 is greedy: always the most probable token. Above, the logits are divided by it.
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1]; 1 keeps all.
        top_k: keep so many of the most probable tokens; 0 keeps all.
        seed: the same seed gives the same text; ``None`` draws one.
        ignore_eos: go on past the model's end-of-text token.
        min_p: drop tokens less probable than this times the best one, in [0, 1]; 0 keeps all.
        presence_penalty: taken from the logits of tokens that were generated, in [-2, 2].
        frequency_penalty: the same, once for each time.
        repetition_penalty: of the prompt's and the generated tokens: divides logits above 0, multiplies others; 1: off.
        logit_bias: pairs of a token id and what is added to its logit, in [-100, 100].
        stop_token_ids: tokens that end the text, even where ``ignore_eos`` goes on.
        num_logprobs: log-probabilities of each token, and of so many best ones, 20 at most; ``None`` gives none.
        stop: texts that end the answer, 16 at most. They are not part of it.

    Raises ``UsageError`` for a value that is none of these.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise FieldError("max_tokens", f"is {self.max_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise FieldError("temperature", f"is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise FieldError("top_p", f"is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise FieldError("top_k", f"is {self.top_k}; it must be 0 (off) or a positive count")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise FieldError("seed", f"is {self.seed}; it must lie in [0, 2**64)")
        if not 0 <= self.min_p <= 1:
            raise FieldError("min_p", f"is {self.min_p}; it must lie in [0, 1]")
        if not -2 <= self.presence_penalty <= 2:
            raise FieldError("presence_penalty", f"is {self.presence_penalty}; it must lie in [-2, 2]")
        if not -2 <= self.frequency_penalty <= 2:
            raise FieldError("frequency_penalty", f"is {self.frequency_penalty}; it must lie in [-2, 2]")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise FieldError("repetition_penalty", f"is {self.repetition_penalty}; it must be a positive number")
        for token_id, bias in self.logit_bias:
            if token_id < 0 or not -100 <= bias <= 100:
                raise FieldError(
                    "logit_bias", f"gives token {token_id} {bias}; ids start at 0, biases lie in [-100, 100]"
                )
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise FieldError("logit_bias", "names a token twice; add its biases up")
        if any(token_id < 0 for token_id in self.stop_token_ids):
            raise FieldError("stop_token_ids", f"holds {min(self.stop_token_ids)}; ids start at 0")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise FieldError("num_logprobs", f"is {self.num_logprobs}; it must lie in 0..{MAX_LOGPROBS}")
        if "" in self.stop or len(self.stop) > MAX_STOPS:
            raise FieldError("stop", f"is {self.stop!r}; it must be at most {MAX_STOPS} texts, none of them empty")

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable the model itself found an emitted token, before any sampling parameter, and its best ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


def interpolate(table: Sequence[tuple[int, float]], num_rows: int) -> float:
    """A cost by rows, which ascend: linear between the entries, constant below the first.

    Beyond the last it goes on as between the last two, but never falls; beyond a single one it is proportional.
    """
    rows = [entry[0] for entry in table]
    if num_rows <= rows[0]:
        return table[0][1]
    if len(table) == 1:
        return table[0][1] * num_rows / rows[0]
    above = min(bisect_left(rows, num_rows), len(table) - 1)
    (left_rows, left), (right_rows, right) = table[above - 1 : above + 1]
    slope = (right - left) / (right_rows - left_rows)
    if num_rows > right_rows:
        return right + max(0.0, slope) * (num_rows - right_rows)
    return left + slope * (num_rows - left_rows)
