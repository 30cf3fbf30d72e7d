"""What stands in front of a GGUF file's tensors: metadata, and where each tensor is. Reads no tensor.

The format is llama.cpp's (docs/gguf.md of ggml), versions 2 and 3. Every length is checked against the file before
anything of that size is read, so that a damaged file is an error and not a machine without memory.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from flowspec.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is, and how its values are stored."""

    path: Path
    offset: int  # bytes, from the beginning of the file
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as of torch: the stored order reversed

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


@dataclass
class Header:
    """One file's metadata and tensors."""

    values: dict[str, Any] = field(default_factory=dict)  # scalars and strings; ``None`` for an array
    tensors: dict[str, TensorPlace] = field(default_factory=dict)  # by the file's own names

    @classmethod
    def read(cls, path: Path) -> Header:
        """Raises ``ModelError`` for what is no GGUF file, or a damaged one."""
        try:
            with path.open("rb") as file:
                return _Reader(path, file, path.stat().st_size).read()
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size

    def read(self) -> Header:
        if self._file.read(4) != b"GGUF":
            raise ModelError(f"{self._path} is no GGUF file; give a model's directory, a hub name, or a .gguf file")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self._path}: GGUF version {version} is not read, only 2 and 3; convert the model again")
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        header = Header()
        for _ in range(self._count(num_values, 13)):  # a value has 13 bytes at least
            name = self._string()
            header.values[name] = self._value(self._scalar("I"))
        places = [self._tensor() for _ in range(self._count(num_tensors, 32))]
        alignment = header.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT:
            raise self._damaged(f"an alignment of {alignment}")
        start = -(-self._file.tell() // alignment) * alignment
        for name, kind, shape, offset in places:
            place = TensorPlace(self._path, start + offset, kind, shape)
            if name in header.tensors:
                raise self._damaged(f"two tensors {name}")
            if place.offset + place.row_bytes * math.prod(shape[:-1]) > self._size:
                raise self._damaged(f"{name} lies beyond the file's end")
            header.tensors[name] = place
        return header

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name, num_dimensions = self._string(), self._scalar("I")
        if not 0 < num_dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        number, offset = self._scalar("I"), self._scalar("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ModelError(
                f"{self._path}: {name} has the type {number}, which this gguf package does not know; convert the model "
                "to a type such as Q8_0 or Q4_K"
            ) from None
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self._damaged(f"{name} with {shape[-1]} columns cannot be {kind.name}")
        return name, kind, shape, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        return self._skip_array()

    def _skip_array(self) -> None:
        """Arrays in it follow one another, with all that is in them: no call for each, however deep."""
        num_left = 1
        while num_left:
            num_left -= 1
            kind, length = self._scalar("I"), self._scalar("Q")
            if kind == _STRING:
                for _ in range(self._count(length, 8)):
                    self._skip(self._scalar("Q"))
            elif kind == _ARRAY:
                num_left += self._count(length, 12)
            else:
                self._skip(length * struct.calcsize(self._code(kind)))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._damaged(f"a value of type {kind}")
        return _SCALARS[kind]

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode(errors="replace")

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise self._damaged("it ends too early")
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise self._damaged("it ends too early")
        self._file.seek(count, 1)

    def _count(self, number: int, least_bytes: int) -> int:
        if number * least_bytes > self._size - self._file.tell():
            raise self._damaged(f"it should hold {number} entries")
        return number

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self._path} is truncated or damaged ({what}); download or copy it again")
