"""What the user types: from a terminal with prompt_toolkit, from a pipe line by line.

A source gives one text after the other, raises ``EOFError`` at the end, and ``KeyboardInterrupt`` for Ctrl-C where
nothing has been typed. A line that ends with a backslash goes on in the next one; blank lines are left out.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol


class Source(Protocol):
    is_interactive: bool

    def read(self) -> str: ...


@contextlib.contextmanager
def keyboard() -> Iterator[Source]:
    """The terminal, where there is one to read from and to write to."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with _keys_kept():
            yield Terminal()
    else:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        yield Pipe()


class Pipe:
    is_interactive = False

    def read(self) -> str:
        while True:
            lines = [input()]
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1].removesuffix("\\")
                try:
                    lines.append(input())
                except EOFError:
                    break
            if text := "\n".join(lines).strip("\n"):
                return text


class Terminal:
    """Lines can be edited and called back; Alt-Enter begins a new one in the same text."""

    is_interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(key_bindings=keys)

    def read(self) -> str:
        lines: list[str] = []
        while True:
            try:
                line = self._session.prompt("... " if lines else "> ")
            except KeyboardInterrupt:
                if not lines and not self._session.default_buffer.text:
                    raise
                lines = []  # as in a shell: what was typed is given up, and nothing else
                continue
            lines.append(line.removesuffix("\\"))
            if line.endswith("\\"):
                continue
            if text := "\n".join(lines).strip("\n"):
                return text
            lines = []


@contextlib.contextmanager
def _keys_kept() -> Iterator[None]:
    """What is typed while text is printed is neither shown nor lost: the next prompt gets it, key by key.

    Ctrl-C stays a signal, and throws nothing away.
    """
    import termios

    terminal = sys.stdin.fileno()
    before, kept = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    kept[0] &= ~termios.ICRNL
    kept[3] = kept[3] & ~(termios.ECHO | termios.ICANON | termios.IEXTEN) | termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, kept)
    try:
        yield
    finally:
        # What nobody has read is not for the shell.
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
