"""The benchmark of encryption, in a small size."""

from __future__ import annotations

import json

from benchmark_script import run_benchmark


def test_encrypted_and_plain_workers_give_the_same_tokens() -> None:
    figures = json.loads(run_benchmark("encryption.py", "--repeat", "1", "--max-new-tokens", "8"))
    assert min(figures["tokens_per_s"].values()) > 0 and figures["encrypted_to_plain"] > 0
