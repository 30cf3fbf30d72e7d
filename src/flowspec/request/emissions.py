"""When a request's tokens came out. docs/METHODOLOGY.md defines the figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Emissions:
    """Tokens come out in batches, one for each verification. All times are in seconds on one clock."""

    start_s: float  # when the request came
    first_s: float | None = None  # when the first tokens came out
    num_first: int = 0  # how many those were
    last_s: float = 0.0  # when the newest came out
    num_tokens: int = 0  # so far

    def note(self, now: float, num_tokens: int) -> float | None:
        """So many are out now, more than before. Returns the seconds since those before; ``None`` for the first."""
        interval_s = None if self.first_s is None else now - self.last_s
        if self.first_s is None:
            self.first_s, self.num_first = now, num_tokens
        self.last_s, self.num_tokens = now, num_tokens
        return interval_s

    @property
    def ttft_s(self) -> float:
        """From the request to its first tokens."""
        assert self.first_s is not None, "no token has come out"
        return self.first_s - self.start_s

    @property
    def total_s(self) -> float:
        """From the request to its last tokens."""
        return self.last_s - self.start_s

    @property
    def came_at_once(self) -> bool:
        """There is no second emission, from which on a rate could be taken."""
        return self.first_s is None or self.first_s == self.last_s

    @property
    def decode_start_s(self) -> float:
        """The first emission; the request itself when all tokens came at once."""
        assert self.first_s is not None, "no token has come out"
        return self.start_s if self.came_at_once else self.first_s

    @property
    def decode_s(self) -> float:
        """To the last emission."""
        return self.last_s - self.decode_start_s

    @property
    def num_decoded(self) -> int:
        """Tokens that came out in ``decode_s``."""
        return self.num_tokens - (0 if self.came_at_once else self.num_first)

    @property
    def tokens_per_s(self) -> float:
        return self.num_decoded / self.decode_s
