"""How much memory a stage takes: weights, peak resident set and anonymous memory, against the whole model.

Writes a random bfloat16 checkpoint to a temporary directory; loads each stage in a process of its own and runs one row,
so that no weight stays an unread page of a mapped file; prints JSON. ``growth`` is what lies above the imports.
Linux only.

    python benchmarks/stage_memory.py [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from flowspec.core import LayerRange
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import forward
from flowspec.model.torch_stage import TorchStage

WHOLE = "whole model"
LARGE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def write_checkpoint(directory: Path, sizes: dict[str, Any]) -> int:
    """Write a random untied Llama, one file a layer, without ever holding it whole; return its bytes."""
    config = LlamaConfig(**sizes, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for shard, names in shards.items():
        weights = {name: torch.randn(shapes[name]).mul_(0.02).bfloat16() for name in names}
        save_file(weights, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(2 * shape.numel() for shape in shapes.values())


def memory_bytes(field: str) -> int:
    """A field of this process's /proc status: VmHWM (peak resident set) or RssAnon (not backed by files)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def measure(directory: str, layers: str) -> dict[str, Any]:
    """Load, run one row, and measure, in a process that has done nothing else."""
    torch.set_num_threads(1)
    imports_peak, imports_anonymous = memory_bytes("VmHWM"), memory_bytes("RssAnon")
    if layers == WHOLE:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, trust_remote_code=False)
        weights_bytes = sum(weight.nbytes for weight in loaded.parameters())
        with torch.inference_mode():
            loaded(torch.zeros(1, 1, dtype=torch.long))
    else:
        start, end = map(int, layers.split(":"))
        loaded = TorchStage.load(Checkpoint.open(directory), LayerRange(start, end), "bfloat16", "cpu")
        weights_bytes = loaded.weights_bytes
        inputs = torch.zeros(1, dtype=torch.long) if loaded.is_first else torch.zeros(1, loaded.hidden_size)
        cache = loaded.open_cache()
        forward(loaded, inputs, cache.slots.append_prefix([0]), cache)
    peak, anonymous = memory_bytes("VmHWM"), memory_bytes("RssAnon")
    return {
        "layers": layers,
        "weights_bytes": weights_bytes,
        "peak_rss_bytes": peak,
        "peak_growth_bytes": peak - imports_peak,
        "anonymous_bytes": anonymous,
        "anonymous_growth_bytes": anonymous - imports_anonymous,
    }


def measure_in_subprocess(directory: Path, layers: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(directory), layers]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def run(small: bool) -> dict[str, Any]:
    sizes = SMALL if small else LARGE
    ranges = ["0:2"] if small else ["0:12", "0:6", "0:4", "4:8", "8:12", "4:6", "4:5"]
    with tempfile.TemporaryDirectory() as directory:
        checkpoint_bytes = write_checkpoint(Path(directory), sizes)
        rows = [measure_in_subprocess(Path(directory), layers) for layers in [*ranges, WHOLE]]
    return {
        "benchmark": "stage_memory",
        "flags": {"small": small},
        "commit": commit(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "checkpoint_bytes": checkpoint_bytes,
        "rows": rows,
    }


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a tiny model and one stage, to see that it runs")
    parser.add_argument("--measure", nargs=2, metavar=("DIRECTORY", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    result = measure(*arguments.measure) if arguments.measure else run(arguments.small)
    print(json.dumps(result, indent=None if arguments.measure else 2))


if __name__ == "__main__":
    main()
