"""The benchmark of the memory, in a small size: it must work, whatever it measures."""

from __future__ import annotations

import json

from benchmark_script import run_benchmark


def test_the_log_is_replayed_with_and_without_the_memory() -> None:
    sizes = ("--stages", "1", "--max-new-tokens", "6", "--temperatures", "0")
    told = json.loads(run_benchmark("draft_memory.py", "--model", "demo", *sizes, "--draft", "ngram"))
    (figures,) = told["tokens_per_pass"].values()
    assert figures.keys() == {"without memory", "with memory"}
    for by_kind in figures.values():
        assert by_kind.keys() == {"code, first", "code, again"} and min(by_kind.values()) >= 1
