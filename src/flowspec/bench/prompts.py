"""Prompt files -> prompts. Knows Spec-Bench's ``question.jsonl`` and plain text; nothing of chat templates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from flowspec.errors import UsageError

# For models of code, as the demo's.
BUILT_IN_PROMPTS = (
    '''class Stack:
    """A last in, first out stack."""

    def __init__(self, items=None):
''',
    '''def read_config(path, encoding="utf-8"):
    """Read a configuration file and return its options as a dictionary."""
''',
    '''import os
import sys

def main(args=None):
    """Run the program."""
    if args is None:
''',
    '''class Counter(dict):
    """Dict subclass for counting hashable items."""

    def most_common(self, n=None):
''',
    '''def copy_file(source, target, *, follow_symlinks=True):
    """Copy data from source to target.

    If follow_symlinks is false,''',
    '''class ParseError(Exception):
    """Raised when the input is not valid."""

    def __init__(self, message, line):
''',
    """class TestQueue(unittest.TestCase):
    def setUp(self):
        self.queue = Queue()

    def test_put(self):
""",
    '''def parse_header(line):
    """Parse a Content-type like header.

    Return the main content-type and a dictionary of options.
    """
''',
)


@dataclass(frozen=True)
class Prompt:
    question_id: str
    category: str  # empty where the file names none
    turns: tuple[str, ...]  # what the user says, at least one turn


class _Question(msgspec.Struct):
    """One line of ``question.jsonl``; other fields are ignored."""

    question_id: int | str
    turns: Annotated[list[str], msgspec.Meta(min_length=1)]
    category: str | None = None


def read_prompts(path: Path | str, num: int | None = None, start: int = 0) -> list[Prompt]:
    """``num`` prompts from the ``start``-th on, or all of them; every line of the file is checked.

    A file is JSON lines if its name says so or its first line with text is a JSON object; else a prompt is a line.
    """
    path = Path(path)
    if num is not None and num < 1:
        raise UsageError(f"{num} prompts were asked for; it must be at least 1")
    if start < 0:
        raise UsageError(f"the first prompt is {start}; it must be 0 or more")
    lines = list(_lines(path))
    if not lines:
        raise UsageError(f"{path}:1: the file holds no prompt")
    read_line = _question if path.suffix == ".jsonl" or _is_object(lines[0][1]) else _plain
    prompts = [read_line(path, number, line) for number, line in lines]
    if start >= len(prompts):
        raise UsageError(
            f"{path}:{lines[-1][0]}: the file ends after {len(prompts)} prompts; start {start} is beyond it"
        )
    return prompts[start:] if num is None else prompts[start : start + num]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with text and their numbers. Only a line feed ends a line: JSON strings may hold other separators."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read prompts from {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text ({error.reason}); convert the file") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _is_object(line: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except msgspec.DecodeError:
        return False


def _question(path: Path, number: int, line: str) -> Prompt:
    try:
        question = msgspec.json.decode(line, type=_Question)
    except msgspec.DecodeError as error:
        raise UsageError(
            f'{path}:{number}: {error}; write {{"question_id": 1, "turns": ["..."]}}, one object a line'
        ) from None
    for turn, text in enumerate(question.turns, 1):
        if not text.strip():
            raise UsageError(f"{path}:{number}: turn {turn} is empty; every turn needs text")
    return Prompt(str(question.question_id), question.category or "", tuple(question.turns))


def _plain(path: Path, number: int, line: str) -> Prompt:
    return Prompt(str(number), "", (line,))
