"""What the shipped draft head and its hints guess of their target's text: the source of the calibration ``demo``.

    python benchmarks/demo_draft.py [--prompts 40] [--levels 16]

Held-out text that the target continues, greedily and at temperature 0.8. Prints one JSON object: hit rates by draft
level, tokens per pass of an EAGLE-2 tree of 60 nodes and 6 levels, and how often a hint's first guess is right after a
share of the layers, by what the draft makes of the token: its first guess, another of its first ten, or none of them.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from flowspec.model.demo_pair import demo_draft_directory
from flowspec.train.demo import load_hints, open_shipped
from flowspec.train.evaluate import EvaluationConfig, HintResult, TextResult, measure_texts


def measure(num_prompts: int, num_levels: int) -> dict[str, Any]:
    """By kind of text."""
    target, head, held_out = open_shipped()
    config = EvaluationConfig(num_prompts=num_prompts, num_levels=num_levels)
    hints = load_hints(demo_draft_directory(), target)
    greedy, sampled = measure_texts(target, head, held_out, config, hints)
    num_layers = target.config.num_hidden_layers
    return {"greedy": figures(greedy, num_layers), "sampled": figures(sampled, num_layers)}


def figures(text: TextResult, num_layers: int) -> dict[str, Any]:
    return {
        "hit_rates": [round(rate, 3) for rate in text.hit_rates],
        "tokens_per_pass": round(text.tokens_per_pass, 2),
        "draft_wrong": round(text.draft_wrong, 3),
        "draft_lacks": round(text.draft_lacks, 3),
        "hints": {f"{hint.num_layers / num_layers:.3f}": hint_rates(hint, text) for hint in text.hints},
    }


def hint_rates(hint: HintResult, text: TextResult) -> list[float]:
    """Where the token is the draft's first guess, another of its list, and none of it."""
    wrong, lacks = text.draft_wrong, text.draft_lacks
    first = (hint.all_tokens.top_1 - wrong * hint.draft_wrong.top_1) / (1 - wrong)
    listed = (wrong * hint.draft_wrong.top_1 - lacks * hint.draft_lacks.top_1) / (wrong - lacks)
    return [round(first, 3), round(listed, 3), round(hint.draft_lacks.top_1, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts")
    parser.add_argument("--levels", type=int, default=16, help="draft levels")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.prompts, arguments.levels), indent=2))


if __name__ == "__main__":
    main()
