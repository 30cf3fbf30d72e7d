"""How kernels are compiled by numba, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
from filelock import FileLock, Timeout
from numba.core import ccallback, config, types
from numba.core.codegen import get_host_cpu_features

from flowspec.model.arm_features import arm_features
from flowspec.model.user_cache import cache_directory

_PATIENCE_S = 180.0
_SOURCES = ("*_kernel.py", "*_code.py", "compiled*.py", "packed.py")  # of kernels, and of what they take

_settings: Any = config
if _settings.CPU_FEATURES is None and arm_features():  # the user has named none
    _settings.CPU_FEATURES = ",".join(filter(None, [get_host_cpu_features(), arm_features()]))


def compiled(function: Callable[..., Any]) -> Any:
    """Without Python's lock, and by the rules of IEEE 754 to the letter: a kernel's bits are the same wherever it is
    called from. Where a product is to be fused with a sum, the kernel says so. Kept on disk where a folder can be.

    numba asks a kernel's own file whether what it kept is old; it is, too, once another kernel that this one calls has
    changed. So that is another version: of what one has kept, numba reads nothing else, which may name what is gone.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        kernel: Any = numba.njit(cache=True, **options)(function)
        kernel._cache._cache_file._version += _stamp()
    except (RuntimeError, AttributeError):  # neither beside this file nor in the user's cache; or in another way there
        return numba.njit(**options)(function)
    return kernel


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Of the processes of one user: what the first of them compiles here, the others read."""
    path = cache_directory("kernels") / "lock"
    lock = _lock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE_S)
    except (OSError, Timeout):  # no folder for it; or somebody stands still
        pass
    try:
        yield
    finally:
        lock.release()


@cache
def _lock(path: Path) -> FileLock:
    """Of this process, whose thread that has it may take it again."""
    return FileLock(path)


def inlined(function: Callable[..., Any]) -> Any:
    """As ``compiled``, into whatever calls it: what is a constant there is one here."""
    return numba.njit(inline="always", error_model="numpy")(function)


@cache
def callback(function: Callable[[int, int, int], None]) -> Any:
    """A kernel of three int64, as other languages call it: its ``address``.

    Who calls it by that is compiled without it. What the function finds around it are constants.
    """
    signature = types.void(*[types.int64] * 3)
    found: Any = ccallback.CFunc(function, (signature.args, signature.return_type), {}, {"error_model": "numpy"})
    try:
        found.enable_caching()
        found._cache._cache_file._version += _stamp()
    except (RuntimeError, AttributeError):  # as above
        pass
    with one_at_a_time():
        found.compile()
    return found


@cache
def _stamp() -> str:
    """Of all kernels' sources."""
    paths = sorted(path for pattern in _SOURCES for path in Path(__file__).parent.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
