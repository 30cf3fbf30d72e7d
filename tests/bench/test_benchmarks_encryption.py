"""The benchmark of encryption, in a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_encrypted_and_plain_workers_give_the_same_tokens() -> None:
    command = [sys.executable, str(BENCHMARKS / "encryption.py"), "--repeat", "1", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert min(figures["tokens_per_s"].values()) > 0 and figures["encrypted_to_plain"] > 0
