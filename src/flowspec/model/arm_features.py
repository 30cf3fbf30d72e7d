"""What an ARM processor can do, as far as compiled kernels need to know it, and LLVM does not say it of itself."""

from __future__ import annotations

import ctypes
import platform
import sys

_HWCAP = 16  # of the auxiliary vector that Linux gives a process
_HWCAP_ASIMDDP = 1 << 20
_DOT_PRODUCTS = b"hw.optional.arm.FEAT_DotProd"  # as macOS calls it


def arm_features() -> str:
    """As LLVM names them, separated by commas; none on other processors.

    LLVM's look at a Linux machine leaves out the dot products of 8 bits, and all where it does not know the board.
    """
    if platform.machine() not in ("aarch64", "arm64"):
        return ""
    return "+neon,+dotprod" if _has_dot_products() else "+neon"  # every one of 64 bits has vectors


def _has_dot_products() -> bool:
    try:
        system = ctypes.CDLL(None)
        if sys.platform == "linux":
            system.getauxval.restype, system.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
            return bool(system.getauxval(_HWCAP) & _HWCAP_ASIMDDP)
        found, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        system.sysctlbyname(_DOT_PRODUCTS, ctypes.byref(found), ctypes.byref(size), None, ctypes.c_size_t(0))
        return bool(found.value)
    except (OSError, AttributeError, TypeError):  # a system that is asked in another way
        return False
