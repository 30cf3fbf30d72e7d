"""The command line in this process: what a command prints, and its exit code, without a new Python each time."""

from __future__ import annotations

import io
import re
import signal
import sys
from dataclasses import dataclass
from typing import Protocol

import pytest

from flowspec.cli.main import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Run(Protocol):
    def __call__(self, *arguments: str, stdin: str = "") -> Done: ...


def apart_from_progress(errors: str) -> str:
    """What a pipe gets, without the lines that long work writes now and then: on a busy machine everything is long."""
    return re.sub(r"^flowspec: [a-z0-9. ]+: \d+%\n", "", errors, flags=re.MULTILINE)


def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], stdin: str
) -> Done:
    """As ``python -m flowspec`` with these arguments, in a pipe; its worker processes are heard too."""
    monkeypatch.setattr(sys, "argv", ["flowspec", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    capfd.readouterr()
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    captured = capfd.readouterr()
    code = end.value.code
    return Done(code if isinstance(code, int) else 0, captured.out, captured.err)
