"""A benchmark as its user runs it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TIMEOUT_S = 540  # less than a test has; machines may be as slow


def run_benchmark(name: str, *arguments: str) -> str:
    """What it has printed."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
