"""What an int8 draft costs in guesses and gives in time, on torch's kernels and on ours. Prints one JSON object.

    python benchmarks/draft_dtype.py [--prompts 40] [--new-tokens 128] [--runs 9] [--threads 1]

Guesses: the demo pair over held-out text, as in its model card, with the draft in float32 and in int8. Time: one pass
of a random head of Llama-2-7B's sizes, lm_head included, without cached tokens; the variants take turns, medians count.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from flowspec.model.compiled_head import KernelLinear, compile_head, weight_of
from flowspec.model.eagle_head import EagleHead
from flowspec.model.int8 import Int8Linear, quantize_head
from flowspec.train.demo import open_shipped
from flowspec.train.evaluate import EvaluationConfig, measure_texts

Pass = tuple[EagleHead, nn.Module]  # the head, and the lm_head it guesses with


def measure_guesses(config: EvaluationConfig) -> dict[str, Any]:
    """Hit rates by level and tokens per target pass of the demo pair, by the draft's dtype."""
    target, head, held_out = open_shipped()
    figures: dict[str, Any] = {}
    for name, (draft, lm_head) in variants(head, target.get_output_embeddings()).items():
        greedy, sampled = measure_texts(target, draft, held_out, config, draft_lm_head=lm_head)
        figures[name] = {
            kind: {"hit_rates": text.hit_rates, "tokens_per_pass": text.tokens_per_pass}
            for kind, text in (("greedy", greedy), ("sampled", sampled))
        }
    return figures


def variants(head: EagleHead, lm_head: Any) -> dict[str, Pass]:
    """The head as it is, by its dtype, and in int8; both on either's kernels."""
    dtype: Any = str(head.embedding.dtype).removeprefix("torch.")
    quantised, *compiled = (copy.deepcopy(head) for _ in range(3))
    quantize_head(quantised)
    made = {dtype: (head, lm_head), f"{dtype}, int8 weights": (quantised, Int8Linear(lm_head.weight))}
    for own, precision in zip(compiled, (dtype, 8), strict=True):
        compile_head(own, precision)
        name = f"{dtype}{', int8 weights' if precision == 8 else ''} on our kernels"
        made[name] = own, KernelLinear(weight_of(lm_head.weight, precision))
    return made


@torch.inference_mode()
def measure_pass_ms(num_runs: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of one draft pass: rows -> variant -> ms."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1
    )
    passes: dict[str, Pass] = {}
    for dtype in (torch.float32, torch.bfloat16):
        lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        head = EagleHead(config, lm_head.weight).to(dtype).eval()
        passes |= variants(head, lm_head)
    return {str(rows): _pass_ms(passes, rows, num_runs) for rows in (1, 4, 8, 16, 32)}


def _pass_ms(passes: dict[str, Pass], num_rows: int, num_runs: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in passes}
    token_ids, positions = torch.arange(num_rows)[None], torch.arange(num_rows)[None]
    mask = torch.ones(num_rows, num_rows, dtype=torch.bool).tril()[None, None]

    def run(head: EagleHead, lm_head: nn.Module, features: Tensor) -> None:
        lm_head(head(token_ids, features, positions, mask))

    for turn in range(num_runs + 1):
        for name, (head, lm_head) in passes.items():
            features = torch.randn(1, num_rows, head.config.hidden_size, dtype=head.embedding.dtype)
            start = time.perf_counter()
            run(head, lm_head, features)
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: round(statistics.median(of_name), 2) for name, of_name in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts; 0: measure no guesses")
    new_tokens = EvaluationConfig.num_new_tokens
    parser.add_argument("--new-tokens", type=int, default=new_tokens, help="of the text that follows each prompt")
    parser.add_argument("--runs", type=int, default=9, help="passes of each kind; 0: measure no time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures: dict[str, Any] = {"threads": arguments.threads}
    if arguments.prompts:
        figures["guesses"] = measure_guesses(EvaluationConfig(arguments.prompts, num_new_tokens=arguments.new_tokens))
    if arguments.runs:
        figures["pass_ms"] = measure_pass_ms(arguments.runs)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
