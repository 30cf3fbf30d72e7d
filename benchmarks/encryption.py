"""What encryption between machines costs: two workers on loopback that have joined, against two without keys.

    python benchmarks/encryption.py [--model demo] [--repeat 8] [--max-new-tokens 128]

Both pipelines stay up; they answer the same question in turn, and must give the same tokens. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack

from elsewhere import WorkerElsewhere, joined_workers
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.llm import LLM

NUM_WORKERS = 2
PROMPT = "Once upon a time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    params = SamplingParams(arguments.max_new_tokens, ignore_eos=True)
    with ExitStack() as stack:
        joined = [worker.address for worker in stack.enter_context(joined_workers(NUM_WORKERS))]
        plain = [stack.enter_context(WorkerElsewhere()).address for _ in range(NUM_WORKERS)]
        llms = {
            name: stack.enter_context(LLM(arguments.model, workers=addresses, config=EngineConfig(memory_tokens=0)))
            for name, addresses in (("plain", plain), ("encrypted", joined))
        }
        speeds: dict[str, list[float]] = {name: [] for name in llms}
        texts = set()
        for turn in range(arguments.repeat + 1):  # the first of each is for warming up
            for name, llm in list(llms.items())[:: -1 if turn % 2 else 1]:
                done = llm.generate(PROMPT, params, schedule="flow")
                speeds[name].append(done.tokens_per_s)
                texts.add(tuple(done.token_ids))
        assert len(texts) == 1, "both give the same tokens"
    ratios = [after / before for before, after in zip(speeds["plain"][1:], speeds["encrypted"][1:], strict=True)]
    figures = {name: statistics.median(each[1:]) for name, each in speeds.items()}
    print(json.dumps({"tokens_per_s": figures, "encrypted_to_plain": statistics.median(ratios)}, indent=1))


if __name__ == "__main__":
    main()
