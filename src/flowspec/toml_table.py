"""Reads the tables of a TOML file into dataclasses; every mistake is told with its file, line, table and key.

Knows no file's form: the fields of a dataclass are a table's keys, their types what the values must be. A type may say
in ``Annotated`` what is expected in a file's own words.
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from flowspec.errors import FieldError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Fields = TypeVar("_Fields", bound="DataclassInstance")
_Named = TypeVar("_Named")

_Path = tuple[str | int, ...]  # keys, and places in lists of tables


@dataclass(frozen=True)
class Table:
    """One table of a file, with what is needed to say where something stands. All raise ``UsageError``."""

    source_name: str
    text: str  # of the whole file
    path: _Path  # () is the root
    values: Mapping[str, object]

    @classmethod
    def load(cls, path: str | Path, what: str) -> Table:
        """The root of a file, which should be ``what``."""
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; give the path of {what}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8 text; give the path of {what}") from None

    @classmethod
    def parse(cls, text: str, source_name: str) -> Table:
        """The root of a text; ``source_name`` stands in errors."""
        text = text.replace("\r\n", "\n")
        try:
            return cls(source_name, text, (), tomllib.loads(text))
        except (ValueError, RecursionError) as error:
            found = re.search(r" \(at line (\d+), column \d+\)", str(error))
            line = int(found[1]) if found else text.count("\n") + 1
            problem = str(error).replace(found[0], "") if found else str(error)
            raise UsageError(f"{source_name}, line {line}: this is not TOML: {problem}") from None

    def error(self, key: str, message: str) -> UsageError:
        """``message``, which names ``key``, after the line of the key, or of the table that should have it."""
        lines = (_line_of(self.text, path) for path in ((*self.path, key), self.path) if path)
        line = next((f", line {line}" for line in lines if line), "")
        table = f"{_header(self.path)} " if self.path else ""
        return UsageError(f"{self.source_name}{line}: {table}{message}")

    def table(self, key: str) -> Table:
        header = _header((*self.path, key))
        if key not in self.values:
            raise self.error(key, f"{key} is missing; add the table {header}")
        values = self.values[key]
        if not isinstance(values, dict):
            raise self.error(key, f"{key} is {_show(values)}; it must be a table, {header}")
        return self._inner((key,), cast("dict[str, object]", values))

    def tables(self) -> list[tuple[str, Table]]:
        """All inner tables by name, for tables whose keys are names."""
        return [(key, self.table(key)) for key in self.values]

    def array(self, key: str) -> list[Table]:
        """The tables of a list; none where it is missing."""
        values = self.values.get(key, [])
        items = cast("list[object]", values if isinstance(values, list) else [values])
        if not all(isinstance(item, dict) for item in items):
            header = _header((*self.path, key, 0))
            raise self.error(key, f"{key} is {_show(self.values[key])}; it must be a list of tables, {header}")
        return [self._inner((key, place), item) for place, item in enumerate(cast("list[dict[str, object]]", items))]

    def check_keys(self, known: list[str]) -> None:
        for key in self.values:
            if key not in known:
                raise self.error(key, f"{key} is unknown; {_suggest(key, known)}")

    def text_of(self, key: str, default: str) -> str:
        """A text outside any dataclass."""
        return cast("str", self._value(key, str)) if key in self.values else default

    def read(self, kind: type[_Fields], **given: object) -> _Fields:
        """The table as a dataclass; its fields are the known keys, but for those that are given."""
        hints = get_type_hints(kind, include_extras=True)
        keys = [field for field in fields(kind) if field.name not in given]
        self.check_keys([field.name for field in keys])
        for field in keys:
            if field.default is MISSING and field.name not in self.values:
                expected = _expected(hints[field.name])
                raise self.error(field.name, f"{field.name} is missing; add it, {expected}")
        values = {field.name: self._value(field.name, hints[field.name]) for field in keys if field.name in self.values}
        try:
            return cast("Callable[..., _Fields]", kind)(**given, **values)
        except FieldError as error:
            raise self.error(error.field, str(error)) from None

    def look_up(self, key: str, name: str, kind: str, known: Mapping[str, _Named]) -> _Named:
        if name not in known:
            raise self.error(key, f"{key} names {name!r}, but there is no [{kind}.{name}]; {_suggest(name, known)}")
        return known[name]

    def _inner(self, path: _Path, values: Mapping[str, object]) -> Table:
        return Table(self.source_name, self.text, (*self.path, *path), values)

    def _value(self, key: str, kind: object) -> object:
        try:
            return _converted(self.values[key], kind)
        except TypeError:
            message = f"{key} is {_show(self.values[key])}; it must be {_expected(kind)}"
            raise self.error(key, message) from None


def _header(path: _Path) -> str:
    name = ".".join(key for key in path if isinstance(key, str))
    return f"[[{name}]]" if isinstance(path[-1], int) else f"[{name}]"


def _line_of(text: str, path: _Path) -> int | None:
    """The line, from 1, that brings in the table or key ``path``. The parser decides: only whole statements parse."""
    lines = text.split("\n")
    start = 1
    for end in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:end]))
        except ValueError:
            continue  # within a statement of several lines
        if _has(values, path):
            return start
        start = end + 1
    return None


def _has(values: object, path: _Path) -> bool:
    for key in path:
        try:
            values = cast("dict[str | int, object]", values)[key]
        except (LookupError, TypeError):
            return False
    return True


def _suggest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {close[0]}?" if close else "correct it or remove it;"
    return f"{advice} Known: {', '.join(names) or 'none'}"


def _show(value: object) -> str:
    """A value in about the form that TOML gives it, cut to a line's length."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _converted(value: object, kind: object) -> object:
    """A TOML value as the type that a field is annotated with. Raises ``TypeError``."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _converted(value, inner[0])
    if origin in (Union, UnionType):
        return _one_of(value, inner)
    if origin is tuple and isinstance(value, list):
        items = cast("list[object]", value)
        kinds = inner[:1] * len(items) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(items):
            return tuple(map(_converted, items, kinds))
    if isinstance(value, str) and (kind is str or origin is Literal):
        return value
    # What a float holds; NaN and infinity are no numbers here, true and false neither.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        if kind is float:
            return float(value)
        if kind is int and isinstance(value, int):
            return value
    raise TypeError


def _one_of(value: object, kinds: tuple[object, ...]) -> object:
    for kind in kinds:
        try:
            return _converted(value, kind)
        except TypeError:
            continue
    raise TypeError


def _expected(kind: object) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(inner[1])
    if origin in (Union, UnionType):
        return " or ".join(_expected(one) for one in inner if one is not type(None))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    return {str: "a text in quotes", int: "a whole number", float: "a finite number"}[cast("type", kind)]
