"""What a model loses with integer weights: perplexity of a text, and how often the best token stays the same.

    python benchmarks/quantised_quality.py MODEL [--text FILE] [--num-tokens 2000]

The whole model is one stage in this process. Windows of 256 tokens, spread evenly over the text, are read each by
itself; all tokens of a window but the first are judged. Prints one JSON object; docs/METHODOLOGY.md has one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowspec.core import LayerRange, Weights
from flowspec.errors import UsageError
from flowspec.model.backends import load_head, load_stage, open_checkpoint
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import forward

WINDOW = 256
WEIGHTS: tuple[Weights, ...] = ("float", "int8", "int4")


def windows_of(token_ids: Sequence[int], num_tokens: int) -> list[Sequence[int]]:
    """As many as have so many tokens; fewer where the text has no more. Raises ``UsageError`` for less than one."""
    if len(token_ids) < WINDOW:
        raise UsageError(f"the text has {len(token_ids)} tokens; give one of at least {WINDOW}")
    num = min(max(1, -(-num_tokens // WINDOW)), len(token_ids) // WINDOW)
    starts = np.linspace(0, len(token_ids) - WINDOW, num).astype(int).tolist()
    return [token_ids[start : start + WINDOW] for start in starts]


@torch.inference_mode()
def judge(checkpoint: Checkpoint, weights: Weights, windows: Sequence[Sequence[int]]) -> tuple[float, Tensor]:
    """Mean negative log-likelihood of a token, and the best tokens everywhere."""
    stage = load_stage(checkpoint, LayerRange(0, checkpoint.num_layers), "float32", weights, "cpu")
    head = load_head(checkpoint, "float32", weights, "cpu")
    losses: list[Tensor] = []
    best: list[Tensor] = []
    for window in windows:
        cache = stage.open_cache()
        slots = cache.slots.append_prefix(np.arange(len(window)))
        logits = head.logits(forward(stage, torch.tensor(window), slots, cache)[:-1])
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none"))
        best.append(logits.argmax(dim=1))
    return float(torch.cat(losses).double().mean()), torch.cat(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a GGUF file, a directory, or a hub name")
    parser.add_argument("--text", help="a file of English text; by default the manual of the Python language")
    parser.add_argument("--num-tokens", type=int, default=2000, help="to read, rounded up to whole windows")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    # The topics of Python's own help are in every installation.
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else "\n".join(topics.values())
    token_ids = checkpoint.load_tokenizer()(text, add_special_tokens=False, verbose=False).input_ids
    windows = windows_of(token_ids, arguments.num_tokens)
    figures: dict[str, Any] = {}
    reference: Tensor | None = None
    for weights in WEIGHTS:
        loss, best = judge(checkpoint, weights, windows)
        reference = best if reference is None else reference
        figures[weights] = {
            "perplexity": math.exp(loss),
            "same_best_token": float((best == reference).double().mean()),
        }
    print(
        json.dumps(
            {
                "model": checkpoint.title,
                "text": arguments.text or f"help topics of Python {platform.python_version()}",
                "windows": len(windows),
                "tokens_per_window": WINDOW,
                "weights": figures,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
