"""How kernels are compiled by numba, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

_SOURCES = ("*_kernel.py", "*_code.py", "compiled.py")


def compiled(function: Callable[..., Any]) -> Any:
    """Without Python's lock, and by the rules of IEEE 754 to the letter: a kernel's bits are the same wherever it is
    called from. Where a product is to be fused with a sum, the kernel says so. Kept on disk where a folder can be.

    numba asks a kernel's own file whether what it kept is old; it is, too, once another kernel that this one calls has
    changed.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        kernel: Any = numba.njit(cache=True, **options)(function)
        kernel._cache._cache_file._source_stamp = _stamp()
    except (RuntimeError, AttributeError):  # neither beside this file nor in the user's cache; or in another way there
        return numba.njit(**options)(function)
    return kernel


@cache
def _stamp() -> str:
    """Of all kernels' sources."""
    paths = sorted(path for pattern in _SOURCES for path in Path(__file__).parent.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
