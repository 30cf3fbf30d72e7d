"""An order to end that is not lost: an exception that a signal's handler raises in a finaliser only gets printed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

_ORDERS = signal.SIGINT, signal.SIGTERM


def note_orders() -> Callable[[], bool]:
    """Whether SIGINT or SIGTERM has come since; whoever handled one until now still does so, after it was noted."""
    has_come = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for order in _ORDERS:
            _note(order, has_come)
    return has_come.is_set


def _note(order: signal.Signals, has_come: threading.Event) -> None:
    before = signal.getsignal(order)
    if not callable(before):  # it is ignored, or ends the process by itself
        return
    handle: Callable[..., Any] = before

    def note(number: int, frame: Any) -> None:
        has_come.set()
        handle(number, frame)

    signal.signal(order, note)
