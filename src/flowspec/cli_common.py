"""What the commands share: the consoles, errors in one line, the progress bar. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
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


def print_table(table: Table) -> None:
    """In full: a narrow terminal breaks lines, but no figure is cut."""
    Console(width=max(stdout.width, _TABLE_WIDTH)).print(table)
