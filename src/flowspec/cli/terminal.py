"""The terminal, or what stands in its place: consoles, errors in one line, progress, tables. Loads nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from flowspec.errors import FlowspecError

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

Cells = Sequence[Sequence[str]]  # of a table: headings, then rows

LINE_INTERVAL_S = 10.0  # of progress where there is no terminal
_COLUMN_GAP = 3  # between two columns of a table


@contextlib.contextmanager
def errors_in_one_line(verbose: bool, is_service: bool = False) -> Iterator[None]:
    """Every way out of a command: what the user did, what went wrong, or Ctrl-C, at which a service is done."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="flowspec: %(message)s", stream=sys.stderr
    )
    logging.getLogger("flowspec.hub").setLevel(logging.INFO)  # downloads are long, and seldom
    for name in ("httpx", "httpx2", "httpcore", "matplotlib", "zeroconf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not verbose:
        # These set up their loggers when they are loaded, here and in worker processes, by what stands here.
        for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # A terminated driver ends its workers as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0 if is_service else 128 + number))
    try:
        yield
    except FlowspecError as error:
        if verbose:
            stderr.print_exception()
        print(f"flowspec: error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if is_service:
            return
        print("flowspec: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


# --- progress ---


class TerminalProgress:
    """Long work: a bar on a terminal, elsewhere a line on standard error now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            console=stderr, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._clock = clock
        self._last_line_s = clock()

    def __call__(self, what: str, done: float) -> None:
        if not stderr.is_terminal:
            self._write_line(what, done)
            return
        if what not in self._tasks:
            self._bar.start()
            self._tasks[what] = self._bar.add_task(what, total=1.0)
        self._bar.update(self._tasks[what], completed=done)

    def _write_line(self, what: str, done: float) -> None:
        """What takes less than the interval is silent."""
        now = self._clock()
        if now - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = now
            print(f"flowspec: {what}: {done:.0%}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Before text is printed: the bar would be drawn over it."""
        if not self._tasks:
            return
        self._bar.stop()
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._tasks = {}


@contextlib.contextmanager
def progress_bar() -> Iterator[TerminalProgress]:
    progress = TerminalProgress()
    try:
        yield progress
    finally:
        progress.stop()


# --- figures ---


def write_json(value: dict[str, Any]) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def print_table(cells: Cells, console: Console = stdout) -> None:
    """As wide as the terminal allows; no figure is cut."""
    for place, piece in enumerate(fitted(cells, console.width)):
        table = Table(show_edge=False, pad_edge=False)
        for index, heading in enumerate(piece[0]):
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for row in piece[1:]:
            table.add_row(*row)
        if place:
            console.print()
        # A terminal that is narrower than a single column breaks its lines.
        Console(file=console.file, width=max(console.width, _width(piece))).print(table)


def fitted(cells: Cells, width: int) -> list[Cells]:
    """A table that is too wide is turned, and when that does not help, cut into several with the same first column."""
    if _width(cells) <= width:
        return [cells]
    names, *rows = cells
    pieces: list[list[Sequence[str]]] = []
    for row in rows:
        if pieces and _width(_turned([*pieces[-1], row])) <= width:
            pieces[-1].append(row)
        else:
            pieces.append([names, row])
    return [_turned(piece) for piece in pieces]


def _turned(cells: Cells) -> Cells:
    return list(zip(*cells, strict=True))


def _width(cells: Cells) -> int:
    widths = [max(len(cell) for cell in column) for column in _turned(cells)]
    return sum(widths) + _COLUMN_GAP * (len(widths) - 1)
