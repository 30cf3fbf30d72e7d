"""Memory of a worker's device: what is free, what this process has of it, and what its operator allows it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from flowspec.errors import DoesNotFitError, UsageError

CGROUP = Path("/sys/fs/cgroup")  # of this process, in a container (version 2)
ADVICE = "give it fewer layers (--partition) or int4 weights"
DRAFT_ADVICE = "give it a smaller draft model or --draft-dtype int4"


class Allowance:
    """What a worker may use of one device, in all."""

    def __init__(self, device: str = "cpu", most_gb: float | None = None) -> None:
        """``most_gb``: in 10^9 bytes; ``None``: whatever is free. Raises ``UsageError``."""
        self._device = torch.device(device)
        self._most_gb = most_gb
        self._base = used_bytes(self._device)  # with nothing loaded
        if most_gb is None:
            return
        if not 0 < most_gb < 1e9:
            raise UsageError(f"--max-memory {most_gb:g}: that is no size in GB; give a positive number")
        total = total_bytes(self._device)
        if total and most_gb * 1e9 > total:
            raise UsageError(f"--max-memory {most_gb:g}: {device} has {total / 1e9:.1f} GB in all; give that or less")
        if most_gb * 1e9 <= self._base:
            raise UsageError(
                f"--max-memory {most_gb:g}: without any layers this process takes {self._base / 1e9:.2f} GB; give more"
            )
        if self._device.type == "cuda":  # torch itself keeps to it, whatever caches and forwards take
            torch.cuda.set_per_process_memory_fraction(min(1.0, most_gb * 1e9 / total), self._device.index)

    @property
    def has_limit(self) -> bool:
        return self._most_gb is not None

    @property
    def free_bytes(self) -> int:
        """That may still be used; 0 where nobody can tell."""
        free = free_bytes(self._device)
        if self._most_gb is None:
            return free
        left = max(1, int(self._most_gb * 1e9) - used_bytes(self._device))
        return min(free, left) if free else left

    def check_fits(self, num_bytes: int, what: str, advice: str = ADVICE) -> None:
        """Raises ``DoesNotFitError`` for more than is free, or can be no part of what is allowed.

        The rest of what is allowed counts as empty. ``advice``: what would make it smaller.
        """
        if self._most_gb is not None and num_bytes > self._most_gb * 1e9 - self._base:
            raise DoesNotFitError(
                f"{what} take {num_bytes / 1e9:.3g} GB, and it may use {self._most_gb:g} GB, {self._base / 1e9:.2g} "
                f"GB of them for itself; {advice}, or take a larger --max-memory"
            )
        free = free_bytes(self._device)
        if free and num_bytes > free:
            raise DoesNotFitError(
                f"{what} take {num_bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB of its memory are free; {advice}, or "
                "end what else is there"
            )


def used_bytes(device: torch.device) -> int:
    """That this process has of the device's memory; as ``top`` shows it, or what torch has given to tensors there."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_bytes()
    return num_pages * resource.getpagesize()


def peak_memory_bytes() -> int:
    """The most that this process has ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def total_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """That the device, or this process' container, has; 0 where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = _meminfo("MemTotal")
    limit = _number(cgroup / "memory.max")
    return total if limit is None else min(total or limit, limit)


def free_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Memory that may still be used there; 0 where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _meminfo("MemAvailable")
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if not available or limit is None or used is None:  # a container may have less
        return available
    return max(1, min(available, limit - used))


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _number(path: Path) -> int | None:
    """``None`` also for "max", where there is no limit."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
