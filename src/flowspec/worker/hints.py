"""What a worker guesses of rows that it has passed on; it only steers what the driver sends next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flowspec.wire.messages import Hint, Segment

NUM_GUESSES = 16  # tokens that a hint names for each row
HINT_SHARE = 0.25  # of a forward's time; dearer hints keep the segments that follow waiting
_NUM_TRIALS = 3  # hints until it is known what one takes


class Hinter(Protocol):
    """Guesses next tokens from what a worker passes on: ``model.hint_head.HintHead``, or what stands in for it."""

    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H] -> the ``k`` best tokens, best first, and their log-probabilities, both [n, k]."""
        ...


class Hints:
    """The segments that wait to be hinted at, as long as hints are cheap."""

    def __init__(self, hinter: Hinter, share: float, clock: Callable[[], float]) -> None:
        """``share``: of a forward's time that a hint may take at most."""
        self._hinter = hinter
        self._share = share
        self._clock = clock
        self._waiting: deque[Segment] = deque()
        self._took_s: list[float] = []  # the first ones

    def offer(self, passed_on: Segment, forward_s: float) -> None:
        """Take a segment, whose forward took so long, unless a hint at it is too dear or of no use."""
        is_cheap = len(self._took_s) < _NUM_TRIALS or min(self._took_s) <= self._share * forward_s
        if is_cheap and passed_on.num_prefix < len(passed_on.node_ids):
            self._waiting.append(passed_on)

    def take(self) -> Segment | None:
        """The oldest that waits."""
        return self._waiting.popleft() if self._waiting else None

    def hint_at(self, segment: Segment) -> Hint:
        assert segment.hidden is not None, "what a worker passes on are hidden states"
        start_s, num_prefix = self._clock(), segment.num_prefix
        token_ids, logprobs = self._hinter.guess(segment.hidden[num_prefix:], NUM_GUESSES)
        if len(self._took_s) < _NUM_TRIALS:
            self._took_s.append(self._clock() - start_s)
        node_ids = segment.node_ids[num_prefix:]
        return Hint(segment.request_id, segment.epoch, node_ids, token_ids.tolist(), logprobs.tolist())
