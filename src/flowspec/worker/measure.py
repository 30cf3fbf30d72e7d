"""What a worker measures of itself at start-up: its stage's forward by rows, its link to the next worker.

Knows no sockets; ``schedule.pace.MeasuredCosts`` makes the costs of segments from what is found here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from flowspec.model.stage import Stage, forward
from flowspec.wire.messages import Echo, Probe

MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
PREFIX_LEN = 64  # tokens before them
_NUM_ROUNDS = 8
_FORWARD_BUDGET_S = 1.0

_NUM_EMPTY_PROBES = 3
_FIRST_PROBE_BYTES = 8 * 1024
_PROBE_GROWTH = 8
_LAST_PROBE_BYTES = _FIRST_PROBE_BYTES * _PROBE_GROWTH**2
_NUM_LAST_PROBES = 3
_LINK_BUDGET_S = 1.0
_RETRY_S = 0.5


def measure_forward(
    stage: Stage,
    vocab_size: int,
    budget_s: float = _FORWARD_BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[int, float]]:
    """(rows, seconds) by growing rows, each the least of several runs; at least that of one row.

    Rows are random: alike ones would all need the same few experts of a mixture. A count is left out when it might not
    end within the budget, at twice the time of the count before.
    """
    cache = stage.open_cache()
    cache.slots.append_prefix(np.arange(PREFIX_LEN))
    slots = cache.slots.append_prefix(PREFIX_LEN + np.arange(MEASURED_ROWS[-1]))
    draw = torch.Generator().manual_seed(0)
    if stage.is_first:
        inputs = torch.randint(vocab_size, (len(slots),), generator=draw)
    else:
        inputs = torch.randn(len(slots), stage.hidden_size, generator=draw).to(stage.dtype)
    deadline_s = clock() + budget_s

    def run_s(num_rows: int) -> float:
        start_s = clock()
        rows = forward(stage, inputs[:num_rows], slots[:num_rows], cache)
        rows.cpu()  # waits for the device, and is made anyway
        return clock() - start_s

    least_s: dict[int, float] = {}
    for num_rows in MEASURED_ROWS:
        if least_s and clock() + 2 * 2 * list(least_s.values())[-1] > deadline_s:
            break
        warm_up_s = run_s(num_rows)
        least_s[num_rows] = run_s(num_rows) if clock() + warm_up_s < deadline_s else warm_up_s
    # Round by round: what disturbs the machine for a while then disturbs no count alone.
    for _ in range(_NUM_ROUNDS):
        for num_rows, seconds in least_s.items():
            if clock() + seconds < deadline_s:
                least_s[num_rows] = min(seconds, run_s(num_rows))
    return list(zip(least_s, never_shrinking(list(least_s.values())), strict=True))


def never_shrinking(seconds: Sequence[float]) -> list[float]:
    """Times by growing rows, each at most the next one: fewer rows take no longer."""
    return np.minimum.accumulate(seconds[::-1])[::-1].tolist()


class LinkMeter:
    """Round trips of probes to the next worker, one at a time: the link's latency and rate.

    The first is repeated until the next worker, which may still be loading, answers; the time allowed starts there.
    Then probes grow while there is time for a larger one, else the last is repeated: a young TCP connection is slow.
    """

    def __init__(self, budget_s: float = _LINK_BUDGET_S) -> None:
        self.is_done = False
        self._budget_s = budget_s
        self._deadline_s: float | None = None  # once the next worker has answered
        self._number = 0  # of the newest probe
        self._under_way: tuple[int, float] | None = None  # its bytes, and when it was sent
        self._trips_s: dict[int, list[float]] = defaultdict(list)  # by bytes

    def next_probe(self, now: float) -> Probe | None:
        """What to send now, if anything; to be asked after each echo, and now and then. Sets ``is_done``."""
        if self.is_done:
            return None
        if self._deadline_s is None:
            must_wait = self._under_way is not None and now - self._under_way[1] < _RETRY_S
            return None if must_wait else self._send(0, now)
        if self._under_way is not None:
            size, sent_s = self._under_way
            if now - sent_s > self._budget_s:
                self._trips_s[size].append(now - sent_s)  # the link is no faster than that
                self.is_done = True
            return None
        size = self._next_size(self._deadline_s - now)
        self.is_done = size is None
        return None if size is None else self._send(size, now)

    def on_echo(self, echo: Echo, now: float) -> None:
        """The first may answer any repetition; later, an echo of an earlier probe tells nothing."""
        is_newest = echo.number == self._number
        if self._under_way is None or (self._deadline_s is not None and not is_newest):
            return
        if self._deadline_s is None:
            self._deadline_s = now + self._budget_s  # this trip may have waited for the next worker
        else:
            size, sent_s = self._under_way
            self._trips_s[size].append(now - sent_s)
        self._under_way = None

    def _send(self, size: int, now: float) -> Probe:
        self._number += 1
        self._under_way = size, now
        return Probe(self._number, bytes(size))

    def _next_size(self, left_s: float) -> int | None:
        """``None``: time is up, or enough is known. One empty probe and one other are always sent."""
        if not self._trips_s:
            return 0
        empty_s, last = min(self._trips_s[0]), max(self._trips_s)
        if not last:
            return 0 if len(self._trips_s[0]) < _NUM_EMPTY_PROBES and empty_s < left_s else _FIRST_PROBE_BYTES
        if last < _LAST_PROBE_BYTES and empty_s + _PROBE_GROWTH * self._wire_s(last) < left_s:
            return last * _PROBE_GROWTH
        is_known = last == _LAST_PROBE_BYTES and len(self._trips_s[last]) == _NUM_LAST_PROBES
        return last if not is_known and empty_s + self._wire_s(last) < left_s else None

    def _wire_s(self, size: int) -> float:
        """What the bytes themselves took: at least what a clock can tell."""
        return max(min(self._trips_s[size]) - min(self._trips_s[0]), 1e-6)

    @property
    def latency_s(self) -> float:
        """One way, of an empty message; once it is done."""
        return min(self._trips_s[0]) / 2

    @property
    def bytes_per_s(self) -> float | None:
        """Of the largest probe, beyond the latency; ``None`` where only an empty one went through; once it is done."""
        largest = max(self._trips_s)
        return largest / self._wire_s(largest) if largest else None
