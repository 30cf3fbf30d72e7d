"""Text files -> training and held-out token streams. Knows files, licences and tokenizers; nothing of models."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowspec.errors import UsageError

Tokens = NDArray[np.int32]

# Directories of the standard library that are data, foreign, or tables rather than code to learn from.
_SKIPPED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "data"})
_TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test"})
_COPYRIGHT_LINE = re.compile(r"^.*\bcopyright\b.*(?:\(c\)|©|\d{4}).*$", re.IGNORECASE | re.MULTILINE)
_FOREIGN_LICENCE = re.compile(
    r"permission to use, copy|permission is hereby granted|redistribution and use|mit license|apache license"
    r"|general public license|bsd license|mozilla public|all rights reserved",
    re.IGNORECASE,
)
_LICENSED_TO_PSF = "licensed to psf under a contributor agreement"
_MAX_DOCUMENT_CHARS = 400_000  # larger files are tables


@dataclass(frozen=True)
class Document:
    name: str  # path relative to the root it was found under, with forward slashes
    text: str


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents that are only ever evaluated on."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def is_held_out(name: str, share: float) -> bool:
    """Decide by the name alone, so that the split survives added, removed and changed files."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_documents(documents: Iterable[Document], held_out_share: float) -> Split:
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document.name, held_out_share) else train).append(document)
    return Split(tuple(train), tuple(held_out))


def has_foreign_notice(text: str) -> bool:
    """True when a standard-library file carries a notice of anyone but the Python Software Foundation."""
    lower = text.lower()
    if _LICENSED_TO_PSF in lower:
        return False
    notices = _COPYRIGHT_LINE.findall(lower) if "copyright" in lower else []
    if any("python software foundation" not in line for line in notices):
        return True
    return "Python Software Foundation" not in text and _FOREIGN_LICENCE.search(text) is not None


def read_stdlib(root: Path | None = None) -> tuple[list[Document], list[Document]]:
    """The interpreter's own library (PSF-2.0): its modules, and apart from them its tests.

    Files with another copyright or licence notice, generated tables and files that are not UTF-8 are left out.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    modules: list[Document] = []
    tests: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        text = _read_text(path)
        if text is None or has_foreign_notice(text):
            continue
        is_test = bool(_TEST_DIRECTORIES.intersection(relative.parts[:-1]))
        (tests if is_test else modules).append(Document(relative.as_posix(), text))
    if not modules:
        raise UsageError(f"{root} holds no Python sources; install the interpreter's standard library as .py files")
    return modules, tests


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Read text files, and all text files below directories; hidden and binary files are skipped."""
    documents: list[Document] = []
    for root in paths:
        if root.is_file():
            files = [root]
        elif root.is_dir():
            files = [p for p in sorted(root.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(root))]
        else:
            raise UsageError(f"training data {root} does not exist; name text files or directories of them")
        for path in files:
            text = _read_text(path)
            if text is not None:
                name = path.name if path == root else path.relative_to(root).as_posix()
                documents.append(Document(name, text))
    if not documents:
        raise UsageError(f"no UTF-8 text in {', '.join(map(str, paths))}; name text files or directories of them")
    return documents


def encode_documents(documents: Sequence[Document], encode: Callable[[str], list[int]], end_of_text_id: int) -> Tokens:
    """One stream of token ids [T], every document between end-of-text tokens; ``encode`` adds no special ones."""
    ids: list[int] = []
    for document in documents:
        ids.append(end_of_text_id)
        ids.extend(encode(document.text))
    ids.append(end_of_text_id)
    return np.asarray(ids, dtype=np.int32)


def windows(tokens: Tokens, length: int, start: int, count: int, seed: int) -> Tokens:
    """Rows ``[start, start + count)`` of an endless shuffled sequence of windows, as int32 [count, length].

    A pure function of its arguments, so a resumed run needs only its position. Each epoch shifts the grid of windows by
    a random offset and visits every window once.
    """
    num_windows = (len(tokens) - 1) // length
    if num_windows < 1:
        raise UsageError(f"the data has {len(tokens)} tokens, fewer than one window of {length}; add more text")
    rows: list[Tokens] = []
    for epoch, index in _shuffled(num_windows, start, count, seed):
        slack = len(tokens) - num_windows * length
        shift = int(np.random.default_rng((seed, epoch, 1)).integers(slack + 1))
        begin = index * length + shift
        rows.append(tokens[begin : begin + length])
    return np.stack(rows)


def shuffled_rows(rows: Tokens, start: int, count: int, seed: int) -> Tokens:
    """Rows ``[start, start + count)`` of an endless sequence of shuffles of ``rows`` [N, T]; a pure function too."""
    return rows[[index for _, index in _shuffled(len(rows), start, count, seed)]]


def _shuffled(num_items: int, start: int, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """(epoch, item) of the places ``[start, start + count)``; each epoch visits every item once, in its own order."""
    epoch, order = -1, np.empty(0, np.int64)
    for place in range(start, start + count):
        if place // num_items != epoch:
            epoch = place // num_items
            order = np.random.default_rng((seed, epoch)).permutation(num_items)
        yield epoch, int(order[place % num_items])


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _read_text(path: Path) -> str | None:
    """The file's text, or None for one that is not UTF-8 text, empty or too large."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.strip() and "\0" not in text and len(text) <= _MAX_DOCUMENT_CHARS else None
