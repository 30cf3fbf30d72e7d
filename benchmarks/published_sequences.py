"""How far ``lockstep`` and ``chunked`` do what FlowSpec's public code (arXiv 2507.02620) does. Prints a table.

    python benchmarks/published_sequences.py [FILE] [--prompts N]

FILE holds what that code did with the demo pair (greedy, float32, a driver and four stages, the settings that it was
measured with): a list with one object a prompt. ``prompt_ids``; for each schedule ``verified_steps``, the tokens that
each verification yielded, and ``segment_rows``, the rows of each segment as sent, those of the prompt first; 0 is an
empty segment. Without FILE it is the one of the tests.

Both sides are compared up to the verification that brings 60 tokens, since a run's end depends on how it is stopped. In
the table, ours / theirs. Ends with 1 where anything differs, and with 2 where FILE cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flowspec.bench.report import markdown_table
from flowspec.config import PUBLISHED_TREE, LockstepConfig, ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.draft.base import DraftSource
from flowspec.emulation.checkpoint_pair import CheckpointPair
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Experiment
from flowspec.emulation.simulator import simulate
from flowspec.errors import UsageError
from flowspec.request.generation import Generation
from flowspec.schedule.base import Schedule
from flowspec.schedule.pace import Pace
from flowspec.wire.messages import Result, Segment

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "schedule" / "published_sequences.json"
SCHEDULES = ("lockstep", "chunked")
NUM_TOKENS = 60  # that are compared, the prompt's own left out
LEVELS = 7  # of a tree; EAGLE's code calls it depth 6
CONFIG = ScheduleConfig(
    lockstep=LockstepConfig(replace(PUBLISHED_TREE, depth=LEVELS, max_depth=2 * LEVELS), expand_depth=LEVELS)
)
CLUSTER = ClusterDescription.load(ROOT / "clusters" / "7b-nano-150m.toml")  # any one with four stages


@dataclass
class Sequences:
    """What happened, up to the verification that brought ``NUM_TOKENS`` tokens."""

    verified_steps: list[int] = field(default_factory=list)  # tokens that each yielded
    segment_rows: list[int] = field(default_factory=list)  # of each segment sent before the last of them

    @property
    def is_whole(self) -> bool:
        return sum(self.verified_steps) >= NUM_TOKENS


class Noting:
    """A schedule, and what it does."""

    def __init__(self, inner: Schedule, sequences: Sequences) -> None:
        self.name, self.tree_config = inner.name, inner.tree_config
        self.uses_draft, self.wants_hints, self.wants_ngrams = inner.uses_draft, inner.wants_hints, inner.wants_ngrams
        self.awaits_passes = inner.awaits_passes
        self._inner = inner
        self._sequences = sequences

    def on_result(self, generation: Generation, result: Result) -> None:
        num_tokens = len(generation.output_ids)
        self._inner.on_result(generation, result)
        self._note(generation, num_tokens)

    def on_idle(self, generation: Generation) -> float:
        num_tokens = len(generation.output_ids)
        wake_s = self._inner.on_idle(generation)
        self._note(generation, num_tokens)
        return wake_s

    def _note(self, generation: Generation, num_before: int) -> None:
        """After one call, which verifies at most once, and emits the prompt's own token first of all."""
        sequences, num_new = self._sequences, len(generation.output_ids) - num_before
        if sequences.is_whole:
            return
        sent = [send.message for send in generation.outbox if isinstance(send.message, Segment)]
        sequences.segment_rows += [len(segment.node_ids) for segment in sent]
        if num_new and num_before:
            sequences.verified_steps.append(num_new)


@dataclass(frozen=True)
class NotedExperiment(Experiment):
    """Whose schedules are watched; of those that the simulator makes only the one that runs does anything."""

    sequences: Sequences = field(default_factory=Sequences)

    def make_schedule(self, name: str, num_stages: int, source: DraftSource | None, pace: Pace) -> Schedule:
        return Noting(super().make_schedule(name, num_stages, source, pace), self.sequences)


class Pair(CheckpointPair):
    """The demo pair, with prompts that are tokens already."""

    def __init__(self) -> None:
        super().__init__("demo", "auto")

    def encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(json.loads(prompt))


def ours(pair: Pair, schedule: str, prompt_ids: Sequence[int]) -> Sequences:
    """What our schedule does. The tail lets the last trees be as deep as any other."""
    params = SamplingParams(max_tokens=NUM_TOKENS + 2 * (LEVELS + 1))
    experiment = NotedExperiment(CLUSTER, CONFIG, params)
    simulate(experiment, pair, schedule, [(0, json.dumps(list(prompt_ids)))])
    return experiment.sequences


def theirs(record: dict[str, Any], schedule: str, num_segments: int) -> Sequences:
    """What the published code did, as far; it is compared over the first ``num_segments`` segments."""
    sequences = Sequences(segment_rows=list(_without_prompt(record, schedule))[:num_segments])
    for num_tokens in record[schedule]["verified_steps"]:
        if not sequences.is_whole:
            sequences.verified_steps.append(num_tokens)
    return sequences


def _without_prompt(record: dict[str, Any], schedule: str) -> Iterator[int]:
    num_left = len(record["prompt_ids"])
    for num_rows in record[schedule]["segment_rows"]:
        if num_left <= 0:
            yield num_rows
        num_left -= num_rows


def compare(pair: Pair, schedule: str, records: Sequence[dict[str, Any]]) -> tuple[list[str], bool]:
    """One row of the table, and whether all is alike."""
    mine = [ours(pair, schedule, record["prompt_ids"]) for record in records]
    other = [theirs(record, schedule, len(own.segment_rows)) for record, own in zip(records, mine, strict=True)]
    pairs = list(zip(mine, other, strict=True))
    sides = (mine, other)
    empty = [sum(each.segment_rows.count(0) for each in side) for side in sides]
    num_rows = [sum(sum(each.segment_rows) for each in side) for side in sides]
    steps = [[num for each in side for num in each.verified_steps] for side in sides]
    row = [
        schedule,
        f"{sum(own.verified_steps == their.verified_steps for own, their in pairs)} of {len(records)}",
        f"{sum(own.segment_rows == their.segment_rows for own, their in pairs)} of {len(records)}",
        f"{empty[0]} / {empty[1]}",
        f"{num_rows[0]} / {num_rows[1]}",
        " / ".join(f"{sum(side) / len(side):.3f}" for side in steps),
    ]
    return row, mine == other


def read_records(path: Path, num_prompts: int | None) -> list[dict[str, Any]]:
    """Raises ``UsageError``."""
    if num_prompts is not None and num_prompts < 1:
        raise UsageError(f"--prompts is {num_prompts}; it must be at least 1")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; leave it out for that of the tests") from None
    except ValueError as error:
        raise UsageError(f"{path} is no JSON file ({error}); write it as this script's text says") from None
    needed = {"prompt_ids", *SCHEDULES}
    is_list = isinstance(records, list) and len(records) > 0
    if not is_list or not all(isinstance(record, dict) and needed <= record.keys() for record in records):
        keys = ", ".join(sorted(needed))
        raise UsageError(f"{path} is no list of objects with {keys}; write it as this script's text says")
    return records[:num_prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", nargs="?", type=Path, default=GOLDEN, help="what the published code did")
    parser.add_argument("--prompts", type=int, help="only so many of its prompts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        records = read_records(arguments.file, arguments.prompts)
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    pair = Pair()
    compared = [compare(pair, schedule, records) for schedule in SCHEDULES]
    headers = ["schedule", "same steps", "same rows", "empty segments", "rows", "tokens per verified segment"]
    print(markdown_table(headers, [row for row, _ in compared]))
    sys.exit(not all(is_alike for _, is_alike in compared))


if __name__ == "__main__":
    main()
