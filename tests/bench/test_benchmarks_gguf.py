"""The benchmarks that take a GGUF file, on a tiny one: they must work, whatever they measure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from benchmark_script import run_benchmark
from flowspec.model.backends import open_checkpoint
from flowspec.model.eagle_head import EagleHead
from flowspec.train.frozen_target import head_config
from tiny_gguf import write_text_gguf

pytest.importorskip("numba")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in Q8_0 that reads bytes."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_text_gguf(path, Kind.Q8_0, num_hidden_layers=2, intermediate_size=128, max_position_embeddings=512)
    return path


def test_the_rivals_benchmark_prints_json(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the old man\nand the sea\n")
    sizes = ("--num-prompts", "2", "--max-new-tokens", "8", "--repeat", "1", "--threads", "1")
    figures = json.loads(run_benchmark("rivals.py", str(model), "--prompts", str(prompts), *sizes))
    assert figures["num_prompts"] == 2 and figures["int8_stage"]["ratio"] >= 1
    assert len(figures["rows"]) == 13 and all(row["tokens_per_s"] > 0 for row in figures["rows"].values())


def test_the_exactness_benchmark_prints_a_table(model: Path) -> None:
    sizes = ("--num-prompts", "3", "--max-new-tokens", "6", "--stages", "2", "--each", "3", "--weights", "int8")
    printed = run_benchmark(
        "exactness.py", str(model), "--drafts", "ngram", "--schedules", "ar,flow,lockstep,auto", *sizes
    )
    *_, last = printed.splitlines()
    assert re.fullmatch(r"\| all +\| +\| +\| +18 \| +108 \| +0 \|", last), "3 prompts at 2 temperatures, each 3 ways"


def test_the_quality_benchmark_prints_json(model: Path) -> None:
    figures = json.loads(run_benchmark("quantised_quality.py", str(model), "--num-tokens", "400"))
    assert figures["windows"] == 2
    exact, int8, int4 = (figures["weights"][name] for name in ("float", "int8", "int4"))
    assert exact["same_best_token"] == 1 and int8["same_best_token"] > 0.9 and 0 < int4["same_best_token"] < 1
    assert abs(int8["perplexity"] / exact["perplexity"] - 1) < 0.05


def test_the_chat_draft_benchmark_prints_json(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    head = EagleHead(head_config(checkpoint.config), torch.zeros(checkpoint.vocab_size, checkpoint.config.hidden_size))
    head.token_ids = torch.arange(0, checkpoint.vocab_size, 2)
    head.save(tmp_path / "draft")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the old man\nand the sea\n")
    sizes = ("--num-prompts", "2", "--max-new-tokens", "12", "--temperatures", "0,1")
    found = json.loads(
        run_benchmark(
            "chat_draft.py", str(model), "--draft", str(tmp_path / "draft"), "--prompts", str(prompts), *sizes
        )
    )
    assert [row["temperature"] for row in found["figures"]] == [0.0, 1.0]
    for row in found["figures"]:
        assert row["tokens_per_pass"] >= 1 and len(row["top_1_by_level"]) == 8
