"""`flow` against `ar` on the demo model over local workers, same text, run in turn. Prints one JSON object.

python benchmarks/demo_speed.py [--repeat 5] [--stages 4] [--max-new-tokens 200]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from flowspec.cli.demo import DEMO_PROMPT
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.llm import LLM, Completion

TEXTS = {
    "temperature 0.8": {"temperature": 0.8, "seed": 3},
    "greedy": {"temperature": 0.0, "seed": None},
}


def run_pairs(llm: LLM, params: SamplingParams, repeat: int) -> dict[str, Any]:
    """Medians over pairs of runs, and the ratio pair by pair, which a drifting machine disturbs least."""
    pairs: list[tuple[Completion, Completion]] = []
    for _ in range(repeat):
        plain, flow = (llm.generate(DEMO_PROMPT, params, schedule=name) for name in ("ar", "flow"))
        assert plain.token_ids == flow.token_ids, "the texts differ"
        pairs.append((plain, flow))
    ratios = [flow.tokens_per_s / plain.tokens_per_s for plain, flow in pairs]
    return {
        "num_tokens": pairs[0][0].num_tokens,
        "ar_tokens_per_s": statistics.median(plain.tokens_per_s for plain, _ in pairs),
        "flow_tokens_per_s": statistics.median(flow.tokens_per_s for _, flow in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "mean_accepted": statistics.median(flow.stats.mean_accepted for _, flow in pairs),
        "ar_link_bytes": pairs[-1][0].stats.link_bytes,
        "flow_link_bytes": pairs[-1][1].stats.link_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs of each text")
    parser.add_argument("--stages", type=int, default=4, help="worker processes")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"stages": arguments.stages, "repeat": arguments.repeat}
    with LLM("demo", stages=arguments.stages, config=EngineConfig(keeps_caches=False, memory_tokens=0)) as llm:
        llm.generate(DEMO_PROMPT, SamplingParams(max_tokens=16))  # warm-up
        for name, settings in TEXTS.items():
            params = SamplingParams(max_tokens=arguments.max_new_tokens, **settings)  # type: ignore[arg-type]
            figures[name] = run_pairs(llm, params, arguments.repeat)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
