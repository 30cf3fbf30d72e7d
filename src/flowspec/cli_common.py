"""What the commands share: the consoles, errors in one line, the progress bar. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from flowspec.errors import FlowspecError

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

# As in ``schedule.catalogue``, which would load torch: ``--help`` must be fast.
COMPARED_NAMES = "ar, serial, chunked, pipedec, lockstep, flow"
SCHEDULE_NAMES = f"auto, {COMPARED_NAMES}"
ABLATION_NAMES = (
    "lockstep-no-score-order, lockstep-no-prune, lockstep-no-expand, flow-no-late-binding, flow-no-segment-costs, "
    "flow-no-steady, flow-no-cancel, flow-no-hints, flow-no-ngrams"
)

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, and show tracebacks.")]


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


_TABLE_WIDTH = 140  # room for every table


@contextlib.contextmanager
def errors_in_one_line(verbose: bool) -> Iterator[None]:
    """Every way out of a command: what the user did, what went wrong, or Ctrl-C."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="flowspec: %(message)s", stream=sys.stderr
    )
    for name in ("transformers", "huggingface_hub", "httpx", "httpcore", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A terminated driver ends its workers as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except FlowspecError as error:
        if verbose:
            stderr.print_exception()
        print(f"flowspec: error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("flowspec: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


class TerminalProgress:
    """A bar on standard error for long work; nothing at all in a pipe."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            console=stderr, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: float) -> None:
        if not stderr.is_terminal:
            return
        if what not in self._tasks:
            self._bar.start()
            self._tasks[what] = self._bar.add_task(what, total=1.0)
        self._bar.update(self._tasks[what], completed=done)

    def stop(self) -> None:
        """Before text is printed: the bar would be drawn over it."""
        if not self._tasks:
            return
        self._bar.stop()
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._tasks = {}


class StatusLine:
    """A line at the bottom of the terminal while text scrolls above it; nothing at all in a pipe.

    The text's part of the screen is a scroll region, so the terminal wraps it as ever and nothing is drawn twice.
    """

    _INTERVAL_S = 0.25
    _SAVE, _RESTORE = "\x1b7", "\x1b8"  # cursor and style

    def __init__(self) -> None:
        self._num_rows = 0  # of the terminal that is set up; 0: none is
        self._shown_s = time.monotonic()  # not at once: the first figures mean little

    def show(self, text: str) -> None:
        now = time.monotonic()
        if not stdout.is_terminal or stdout.is_dumb_terminal or now - self._shown_s < self._INTERVAL_S:
            return
        self._shown_s = now
        num_columns, num_rows = os.get_terminal_size(sys.stdout.fileno())
        if num_rows < 4 or num_columns <= len(text):
            return
        if num_rows != self._num_rows:
            # One down and up again: on the last row, the text moves up to make room.
            sys.stdout.write(f"\x1bD\x1b[A{self._SAVE}\x1b[1;{num_rows - 1}r{self._RESTORE}")
            self._num_rows = num_rows
        self._draw(f"\x1b[2m{text}")

    def _draw(self, text: str) -> None:
        sys.stdout.write(f"{self._SAVE}\x1b[{self._num_rows};1H\x1b[2K{text}{self._RESTORE}")
        sys.stdout.flush()

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._num_rows:
            self._draw("\x1b[r")
            self._num_rows = 0


def print_table(table: Table) -> None:
    """In full: a narrow terminal breaks lines, but no figure is cut."""
    Console(width=max(stdout.width, _TABLE_WIDTH)).print(table)
