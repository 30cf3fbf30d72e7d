"""What encryption between machines costs: two workers on loopback that have joined, against two without keys.

    python benchmarks/encryption.py [--model demo] [--repeat 8] [--max-new-tokens 128]

Both pipelines stay up; they answer the same question in turn, and must give the same tokens. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from elsewhere import WorkerElsewhere
from flowspec.cluster.membership import Membership
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.llm import LLM
from flowspec.wire.key_file import STATE_VARIABLE

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
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flowspec-encryption-")))
        os.environ[STATE_VARIABLE] = str(folder / "driver")
        membership = Membership.init(folder / "driver")
        token = str(membership.new_token())
        states = [{STATE_VARIABLE: str(folder / name)} for name in ("plain", *map(str, range(NUM_WORKERS)))]
        plain_workers = [stack.enter_context(WorkerElsewhere(environment=states[0])) for _ in range(NUM_WORKERS)]
        plain = [worker.address for worker in plain_workers]
        joined_workers = [
            stack.enter_context(WorkerElsewhere("--join", token, environment=state)) for state in states[1:]
        ]
        joined = [worker.address for worker in joined_workers]
        for address in joined:
            membership.let_join(address)
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
