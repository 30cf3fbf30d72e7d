"""A worker ends when it is told to, wherever the signal strikes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import pytest

from flowspec.worker.ending import note_orders


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
def test_an_order_to_end_is_noted_though_its_exception_is_lost(order: signal.Signals) -> None:
    kept = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(order, lambda *_: sys.exit(0))
    try:
        is_over = note_orders()
        assert not is_over()
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), order)
        assert is_over()
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)


def test_an_order_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        is_over = note_orders()
        os.kill(os.getpid(), signal.SIGINT)
        assert not is_over() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
