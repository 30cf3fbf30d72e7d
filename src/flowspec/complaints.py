"""What a log is told of others' mistakes: short lines of printable characters, and few, however much they send."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from flowspec.errors import shortened

_MOST, _PER_S = 10, 60.0  # lines in so long a time


class Complaints:
    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._told_s: deque[float] = deque(maxlen=_MOST)
        self._num_silent = 0  # since the last line

    def warn(self, text: str) -> None:
        """One line, or none when there were many lately; the next one says how many that were."""
        now_s = self._clock()
        if len(self._told_s) == _MOST and now_s - self._told_s[0] < _PER_S:
            self._num_silent += 1
            return
        more = f" ({self._num_silent} more such warnings were left out)" if self._num_silent else ""
        self._told_s.append(now_s)
        self._num_silent = 0
        self._logger.warning("%s%s", shortened(text), more)
