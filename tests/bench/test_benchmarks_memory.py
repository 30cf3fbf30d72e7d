"""The benchmark of the memory, in a small size: it must work, whatever it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_log_is_replayed_with_and_without_the_memory() -> None:
    command = [sys.executable, str(BENCHMARKS / "draft_memory.py"), "--model", "demo", "--stages", "1"]
    command += ["--max-new-tokens", "6", "--temperatures", "0", "--draft", "ngram"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads(done.stdout)["tokens_per_pass"].values()
    assert figures.keys() == {"without memory", "with memory"}
    for by_kind in figures.values():
        assert by_kind.keys() == {"code, first", "code, again"} and min(by_kind.values()) >= 1
