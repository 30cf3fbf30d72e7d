"""What the memory of earlier requests is worth, on a replayed log of chats and code edits. Prints one JSON object.

    python benchmarks/draft_memory.py [--model smollm2] [--rounds 2] [--max-new-tokens 96] [--temperatures 0,0.8]

The log, in the order of its requests: users hold the same conversations of several turns, some with other words before
or another question at the end, and have functions rewritten that were rewritten before, with other names. The answers
are the model's own, so each turn's prompt has those before it. The log runs once with the memory and once without, by
``flow``; the texts must be the same. ``tokens_per_pass``: tokens emitted for each verification that emitted any, over
all requests of a kind, the first round (when nothing is known) apart from those that follow.

A model without a chat template (the toy that ships) continues the pieces of code instead, and no chats are run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.errors import FlowspecError, UsageError
from flowspec.llm import LLM

CHATS = (
    ("How do I make tea?", "And what can I eat with it?"),
    ("Why is the sky blue?", "Explain it to a child."),
    ("Write a short letter to my landlord. The heating is broken.", "Make it more polite."),
)
GREETINGS = ("", "Hello! ", "Good morning. ")  # before a round's first questions
CODE = (
    """\
def {name}(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
""",
    """\
class {name}:
    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def put(self, item):
        self.items.append(item)

    def get(self):
        return self.items.pop(0)
""",
)
NAMES = (("mean", "Queue"), ("average", "Line"), ("middle", "Buffer"))  # by round
WORDS = "Add comments to this code:\n\n```python\n{code}```"

Turns: TypeAlias = tuple[str, ...]


def log_of(round_number: int, is_chat: bool) -> list[tuple[str, Turns]]:
    """The requests of one round: what kind they are, and what the user says, turn by turn."""
    place = round_number % len(NAMES)
    codes = [code.format(name=name) for code, name in zip(CODE, NAMES[place], strict=True)]
    if not is_chat:
        return [("code", (code,)) for code in codes]
    chats = [(GREETINGS[place] + first, *others) for first, *others in CHATS]
    return [*(("chats", turns) for turns in chats), *(("code", (WORDS.format(code=code),)) for code in codes)]


class Replay:
    """The log with or without the memory."""

    def __init__(self, arguments: argparse.Namespace, memory_tokens: int, temperature: float) -> None:
        self._arguments = arguments
        self._params = SamplingParams(max_tokens=arguments.max_new_tokens, temperature=temperature, seed=1)
        self._config = EngineConfig(keeps_caches=False, memory_tokens=memory_tokens)
        self.texts: list[list[int]] = []
        self._counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # tokens and passes, by kind

    def run(self) -> dict[str, float]:
        """Tokens per pass by kind."""
        arguments = self._arguments
        with LLM(arguments.model, stages=arguments.stages, draft=arguments.draft, config=self._config) as llm:
            for round_number in range(arguments.rounds):
                for kind, turns in log_of(round_number, llm.engine.model.chat_template.is_there):
                    when = "first" if not round_number else "again"
                    self._count(f"{kind}, {when}", self._hold(llm, turns))
        return {kind: round(tokens / passes, 3) for kind, (tokens, passes) in self._counts.items()}

    def _hold(self, llm: LLM, turns: Sequence[str]) -> list[int]:
        """A conversation; tokens and passes of its answers."""
        tokens = passes = 0
        said: list[Any] = []
        for turn in turns:
            if llm.engine.model.chat_template.is_there:
                said.append({"role": "user", "content": turn})
                answer = llm.chat(said, self._params, schedule="flow")
                said.append({"role": "assistant", "content": answer.text})
            else:
                answer = llm.generate(turn, self._params, schedule="flow")
            assert llm.last_stats is not None
            tokens, passes = tokens + answer.num_tokens, passes + llm.last_stats.verdicts
            self.texts.append(answer.token_ids)
        return [tokens, passes]

    def _count(self, kind: str, found: list[int]) -> None:
        self._counts[kind] = [a + b for a, b in zip(self._counts[kind], found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--draft", default="auto", help="which the memory joins")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="1 to 3")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperatures", default="0,0.8")
    arguments = parser.parse_args()
    if not 1 <= arguments.rounds <= len(NAMES):
        raise UsageError(f"--rounds is {arguments.rounds}; it must lie in 1..{len(NAMES)}")
    figures: dict[str, Any] = {}
    for temperature in arguments.temperatures.split(","):
        replays = {
            name: Replay(arguments, memory_tokens, float(temperature))
            for name, memory_tokens in (("without", 0), ("with", EngineConfig.memory_tokens))
        }
        figures[f"temperature {temperature}"] = {f"{name} memory": replay.run() for name, replay in replays.items()}
        if replays["with"].texts != replays["without"].texts:
            raise FlowspecError("the memory has changed a text; please report this")
    print(json.dumps({**vars(arguments), "tokens_per_pass": figures}, indent=2))


if __name__ == "__main__":
    main()
