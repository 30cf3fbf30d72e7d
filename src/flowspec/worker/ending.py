"""An order to end that is not lost: an exception that a signal's handler raises in a finaliser only gets printed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


def note_sigterm() -> Callable[[], bool]:
    """Whether SIGTERM has come since; whoever handled it until now still does so, after it was noted."""
    has_come = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and callable(before):
        handle: Callable[..., Any] = before

        def note(number: int, frame: Any) -> None:
            has_come.set()
            handle(number, frame)

        signal.signal(signal.SIGTERM, note)
    return has_come.is_set
