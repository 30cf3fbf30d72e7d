"""What encryption between machines costs: two workers on loopback that have joined, against two without keys.

    python benchmarks/encryption.py [--model demo] [--repeat 8] [--max-new-tokens 128]

Both pipelines stay up; they answer the same question in turn, and must give the same tokens. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flowspec.cluster.membership import Membership
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.llm import LLM
from flowspec.wire.key_file import STATE_VARIABLE

NUM_WORKERS = 2
PROMPT = "Once upon a time"


@contextmanager
def running_worker(state: Path, *arguments: str) -> Iterator[str]:
    """A worker on a port of its own; its address."""
    command = [sys.executable, "-m", "flowspec", "worker", "--threads", "1", "--listen", "127.0.0.1:0", *arguments]
    environment = {**os.environ, STATE_VARIABLE: str(state)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        told = process.stderr.readline()
        found = re.search(r"listening on tcp://(\S+:\d+)", told)
        if found is None:
            raise RuntimeError(f"a worker did not start: {told}")
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


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
        plain = [stack.enter_context(running_worker(folder / f"plain{i}")) for i in range(NUM_WORKERS)]
        joined = [stack.enter_context(running_worker(folder / f"{i}", "--join", token)) for i in range(NUM_WORKERS)]
        for address in joined:
            membership.let_join(address)
        llms = {
            name: stack.enter_context(LLM(arguments.model, workers=addresses, config=EngineConfig(memory_tokens=0)))
            for name, addresses in (("plain", plain), ("encrypted", joined))
        }
        speeds: dict[str, list[float]] = {name: [] for name in llms}
        texts = set()
        for _ in range(arguments.repeat + 1):  # the first of each is for warming up
            for name, llm in llms.items():
                done = llm.generate(PROMPT, params, schedule="flow")
                speeds[name].append(done.tokens_per_s)
                texts.add(tuple(done.token_ids))
        assert len(texts) == 1, "both give the same tokens"
    ratios = [after / before for before, after in zip(speeds["plain"][1:], speeds["encrypted"][1:], strict=True)]
    figures = {name: statistics.median(each[1:]) for name, each in speeds.items()}
    print(json.dumps({"tokens_per_s": figures, "encrypted_to_plain": statistics.median(ratios)}, indent=1))


if __name__ == "__main__":
    main()
