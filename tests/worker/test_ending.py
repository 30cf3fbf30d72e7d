"""A worker ends when it is told to, wherever the signal strikes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from flowspec.worker.ending import note_sigterm


def test_an_order_to_end_is_noted_though_its_exception_is_lost() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        is_over = note_sigterm()
        assert not is_over()
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        assert is_over()
    finally:
        signal.signal(signal.SIGTERM, before)
