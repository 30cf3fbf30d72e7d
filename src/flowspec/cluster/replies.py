"""What workers may send to the driver: everything a session trusts is checked here, before anybody uses it.

Whether a result fits what its own request has sent is for ``request.generation`` to say, which knows that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from flowspec.errors import ProtocolError, require
from flowspec.wire.messages import (
    Broken,
    Echo,
    Failed,
    Fetching,
    Guesses,
    Hint,
    Loading,
    Ready,
    Result,
    Stamped,
    Timing,
    ToDriver,
)

_MAX_HINTS = 64  # tokens that a hint may name for a row
_MAX_COUNT = 2**63


@dataclass(frozen=True)
class Replies:
    """Of one pipeline's workers."""

    num_stages: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype  # of hidden states
    taps_width: int | None = None  # of the features that the stages add up; ``None``: none are
    num_best: int = 0  # tokens that a draft model names for each row; 0: it is none

    def check(self, message: ToDriver, stage: int) -> None:
        """Raises ``ProtocolError`` for what no worker of this stage says."""
        match message:
            case Result():
                self._check_result(message, stage)
            case Guesses():
                self._check_guesses(message)
            case Hint():
                self._check_hint(message, stage)
            case Ready():
                self._check_ready(message, stage)
            case Fetching():
                is_count = 0 <= message.num_bytes <= message.num_wanted < _MAX_COUNT
                require(is_count, f"it has fetched {message.num_bytes} of {message.num_wanted} bytes")
            case Loading():
                require(0 <= message.fraction <= 1, f"it has loaded {message.fraction} of its stage")
            case Broken() | Failed():
                require(message.stage == stage, f"it speaks for worker {message.stage}")
            case Echo():
                require(math.isfinite(message.clock_s), f"its clock shows {message.clock_s}")
            case Stamped():
                raise ProtocolError("it plays a device of an emulated cluster")
            case _:
                pass

    def _check_result(self, result: Result, stage: int) -> None:
        require(stage == self.num_stages, "it sends results, and only the last one does")
        shape, ids, features = tuple(result.hidden.shape), result.node_ids, result.features
        require(
            shape[1:] == (self.hidden_size,) and result.hidden.dtype == self.dtype,
            f"its hidden states are {result.hidden.dtype} {list(shape)}, not {self.dtype} of width {self.hidden_size}",
        )
        if features is not None:
            shape = tuple(features.shape)
            require(
                shape[1:] == (self.taps_width,) and features.dtype == self.dtype,
                f"its features are {features.dtype} {list(shape)}, not {self.dtype} of width {self.taps_width or 0}",
            )
        _check_ids(ids, "result")
        require(result.num_prefix >= 0, f"a result has {result.num_prefix} prefix rows")
        self._check_timings(result.timings)

    def _check_timings(self, timings: Sequence[Timing]) -> None:
        stages = [timing.stage for timing in timings]
        require(stages == list(range(1, self.num_stages + 1)), f"a result's timings are of the stages {stages[:20]}")
        for timing in timings:
            is_time = math.isfinite(timing.start_s) and timing.start_s <= timing.end_s < math.inf
            is_count = 0 <= timing.num_rows <= timing.num_shared < _MAX_COUNT and 0 <= timing.link_bytes < _MAX_COUNT
            require(is_time and is_count, f"a result has the impossible timing {tuple(timing)}")

    def _check_hint(self, hint: Hint, stage: int) -> None:
        require(stage < self.num_stages, "it sends hints, and the last one has none")
        _check_ids(hint.node_ids, "hint")
        for tokens, logprobs in zip(hint.token_ids, hint.logprobs, strict=True):
            require(len(tokens) <= _MAX_HINTS, f"a hint names {len(tokens)} tokens for one row")
            require(all(0 <= token < self.vocab_size for token in tokens), "a hint names a token that is none")
            require(not any(math.isnan(logprob) for logprob in logprobs), "a hint is not a number")

    def _check_guesses(self, guesses: Guesses) -> None:
        shape, ids, logprobs = tuple(guesses.token_ids.shape), guesses.token_ids, guesses.logprobs
        require(0 < shape[1] <= self.num_best, f"it names {shape[1]} tokens for a row")
        require((ids.dtype, logprobs.dtype) == (torch.int32, torch.float32), "its guesses are of other types")
        is_token = bool(((ids >= 0) & (ids < self.vocab_size)).all())
        require(is_token, "it guesses a token that is none")
        _check_ids(guesses.node_ids, "guess")

    def _check_ready(self, ready: Ready, stage: int) -> None:
        require(ready.stage == stage, f"it has loaded stage {ready.stage}")
        counts = (ready.weight_bytes, ready.peak_memory_bytes, ready.slot_bytes, ready.free_bytes)
        require(all(0 <= count < _MAX_COUNT for count in counts), f"its memory is {counts}")
        rows = [num_rows for num_rows, _ in ready.forward_s]
        require(rows == sorted(set(rows)) and all(0 < num < _MAX_COUNT for num in rows), f"it has measured {rows[:20]}")
        seconds = [taken_s for _, taken_s in ready.forward_s]
        require(all(0 < taken_s < math.inf for taken_s in seconds), "a forward that it has measured took no time")
        is_told = 0 <= ready.load_s < math.inf and 0 <= ready.fetched_bytes < _MAX_COUNT
        require(is_told, f"it has loaded for {ready.load_s} s, and fetched {ready.fetched_bytes} bytes")
        rate = ready.link_bytes_per_s
        require(rate is None or 0 < rate < math.inf, f"its link carries {rate} bytes a second")


def _check_ids(ids: Sequence[int], what: str) -> None:
    require(all(left < right for left, right in pairwise(ids)), f"the node ids of a {what} do not grow")
    require(not ids or 0 <= ids[0] <= ids[-1] < _MAX_COUNT, f"a {what} has a node id that is none")
