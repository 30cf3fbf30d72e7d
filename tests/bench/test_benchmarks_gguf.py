"""The benchmarks that take a GGUF file, on a tiny one: they must work, whatever they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tiny_models import make_text_tokenizer

pytest.importorskip("openvino")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NUM_LAYERS, HIDDEN, INNER, NUM_HEADS, NUM_KV_HEADS = 2, 64, 128, 4, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in Q8_0 that reads bytes."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = make_text_tokenizer("byte-level")
    words = sorted(tokenizer.get_vocab(), key=lambda word: tokenizer.get_vocab()[word])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(NUM_LAYERS)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tokenizer.all_special_tokens else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(words.index("</s>"))
    inner_kv = HIDDEN * NUM_KV_HEADS // NUM_HEADS
    matrices = {"token_embd": (len(words), HIDDEN), "output": (len(words), HIDDEN)}
    for layer in range(NUM_LAYERS):
        matrices |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        matrices |= {f"blk.{layer}.{name}": (inner_kv, HIDDEN) for name in ("attn_k", "attn_v")}
        matrices |= {f"blk.{layer}.{name}": (INNER, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        matrices[f"blk.{layer}.ffn_down"] = (HIDDEN, INNER)
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for name, shape in matrices.items():
        values = 0.3 * rng.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    norms = [f"blk.{layer}.{name}" for layer in range(NUM_LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_rivals_benchmark_prints_json(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the old man\nand the sea\n")
    sizes = ("--num-prompts", "2", "--max-new-tokens", "8", "--repeat", "1", "--threads", "1")
    figures = run("rivals.py", str(model), "--prompts", str(prompts), *sizes)
    assert figures["num_prompts"] == 2 and figures["int8_stage"]["ratio"] >= 1
    assert len(figures["rows"]) == 8 and all(row["tokens_per_s"] > 0 for row in figures["rows"].values())


def test_the_quality_benchmark_prints_json(model: Path) -> None:
    figures = run("quantised_quality.py", str(model), "--num-tokens", "400")
    assert figures["windows"] == 2
    exact, int8, int4 = (figures["weights"][name] for name in ("float", "int8", "int4"))
    assert exact["same_best_token"] == 1 and int8["same_best_token"] > 0.9 and 0 < int4["same_best_token"] < 1
    assert abs(int8["perplexity"] / exact["perplexity"] - 1) < 0.05
