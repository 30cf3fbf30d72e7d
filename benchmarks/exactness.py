"""Every schedule, draft and partition against plain decoding of the same weights, on a real model. Prints a table.

    python benchmarks/exactness.py MODEL [--prompts FILE,...] [--num-prompts 200] [--max-new-tokens 48]
        [--weights int8,int4] [--drafts none,ngram,auto] [--stages 1,2,4] [--schedules ar,flow,...]
        [--temperatures 0,0.8] [--each N] [--json]

Plain decoding is ``ar`` of one stage without a draft; sampled texts have a seed of their own. Each prompt goes through
all schedules with every draft over every partition (``--each N``: through the N of these that are next in turn, so
that all get as many), and must give the same token ids. Worker processes as ``generate`` starts them; engines keep
their caches and what earlier texts said, as users' do. Exit code 1 when a text differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from flowspec.bench.local import encode
from flowspec.bench.prompts import read_prompts
from flowspec.bench.report import markdown_table
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams, Weights
from flowspec.llm import LLM
from flowspec.schedule.catalogue import AUTO, SCHEDULES
from flowspec.train.openers import OPENERS

SUBJECTS = ("a lighthouse", "prime numbers", "the river Nile", "old bread")


@dataclass(frozen=True)
class Case:
    """One request, and what plain decoding says to it."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    expected: list[int]


@dataclass
class Tally:
    """Of one way to run the model."""

    num_texts: int = 0
    num_tokens: int = 0
    differing: list[str] = field(default_factory=list)

    def note(self, number: int, case: Case, found: Sequence[int]) -> None:
        self.num_texts += 1
        self.num_tokens += len(found)
        if list(found) != case.expected:
            pairs = enumerate(itertools.zip_longest(found, case.expected))
            place = next(place for place, (ours, plain) in pairs if ours != plain)
            self.differing.append(f"text {number} from token {place} on, at T={case.params.temperature:g}")


def questions(paths: Sequence[str], num: int) -> list[str]:
    """The first ones of all files in turn; without files, made of the beginnings that training uses."""
    if not paths:
        made = [f"{opener} {subject}" for subject in SUBJECTS for opener in OPENERS]
        return made[:num]
    files = [[prompt.turns[0] for prompt in read_prompts(path, num)] for path in paths]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*files))
    return list(itertools.islice(filter(None, in_turn), num))


def plain_decoding(
    model: str, weights: Weights, texts: Sequence[str], temperatures: Sequence[float], num_tokens: int
) -> list[Case]:
    cases: list[Case] = []
    config = EngineConfig(keeps_caches=False, memory_tokens=0)
    with LLM(model, draft="none", stages=1, schedule="ar", weights=weights, config=config) as llm:
        prompts = [encode(llm, text) for text in texts]
        for temperature in temperatures:
            for seed, prompt_ids in enumerate(prompts):
                params = SamplingParams(num_tokens, temperature=temperature, seed=seed)
                cases.append(Case(prompt_ids, params, llm.generate(prompt_ids, params).token_ids))
                tell(f"{weights}: plain decoding", len(cases), len(prompts) * len(temperatures))
    return cases


def run_engine(llm: LLM, schedules: Sequence[str], shares: Sequence[Sequence[tuple[int, Case]]]) -> Iterator[Tally]:
    """A tally for each schedule, which runs its share of the cases."""
    for schedule, share in zip(schedules, shares, strict=True):
        tally = Tally()
        for number, case in share:
            tally.note(number, case, llm.generate(case.prompt_ids, case.params, schedule=schedule).token_ids)
            tell(f"{schedule}, {llm.partition}, {len(tally.differing)} differ", tally.num_texts, len(share))
        yield tally


def tell(what: str, done: int, of: int) -> None:
    if done == of or done % 20 == 0:
        print(f"{time.strftime('%H:%M:%S')} {what}: {done} of {of}", file=sys.stderr, flush=True)


def main() -> int:
    arguments = read_arguments()
    texts = questions(arguments.prompts, arguments.num_prompts)
    rows: list[dict[str, Any]] = []
    for weights in arguments.weights:
        cases = plain_decoding(arguments.model, weights, texts, arguments.temperatures, arguments.max_new_tokens)
        engines = [(stages, draft) for stages in arguments.stages for draft in arguments.drafts]
        num_ways = len(engines) * len(arguments.schedules)
        each = min(arguments.each or num_ways, num_ways)
        for place, (stages, draft) in enumerate(engines):
            first_way = place * len(arguments.schedules)
            ways = range(first_way, first_way + len(arguments.schedules))
            # Case number c goes through the ways c * each, c * each + 1, ... of all, round and round.
            shares = [
                [(number, case) for number, case in enumerate(cases) if (way - number * each) % num_ways < each]
                for way in ways
            ]
            with LLM(arguments.model, draft=draft, stages=stages, weights=weights) as llm:
                for schedule, tally in zip(
                    arguments.schedules, run_engine(llm, arguments.schedules, shares), strict=True
                ):
                    rows.append(
                        {"weights": weights, "stages": stages, "draft": draft, "schedule": schedule, **vars(tally)}
                    )
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))
    for row in rows:
        for text in row["differing"]:
            print(f"DIFFERS: {row['weights']}, {row['stages']}, {row['draft']}, {row['schedule']}: {text}")
    return int(any(row["differing"] for row in rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for all schedules of an engine."""
    lines: list[list[str]] = []
    for (weights, stages, draft), group in itertools.groupby(
        rows, lambda row: (row["weights"], row["stages"], row["draft"])
    ):
        of_engine = list(group)
        sums = [sum(row[name] for row in of_engine) for name in ("num_texts", "num_tokens")]
        differ = sum(len(row["differing"]) for row in of_engine)
        lines.append([weights, str(stages), draft, *map(str, sums), str(differ)])
    lines.append(["all", "", "", *(str(sum(int(line[column]) for line in lines)) for column in (3, 4, 5))])
    return markdown_table(["weights", "stages", "draft", "texts", "tokens", "texts that differ"], lines)


def read_arguments() -> argparse.Namespace:
    def of(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",") if part]

    def weights(text: str) -> Weights:
        if text not in get_args(Weights):
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(get_args(Weights))}")
        return cast("Weights", text)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a directory, a GGUF file, smollm2 or demo")
    parser.add_argument("--prompts", type=of(str), default=[], help="files as flowspec bench reads them")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--weights", type=of(weights), default=["int8", "int4"])
    parser.add_argument("--drafts", type=of(str), default=["ngram", "auto"], help="as generate takes them")
    parser.add_argument("--stages", type=of(int), default=[1, 2, 4])
    parser.add_argument("--schedules", type=of(str), default=[*SCHEDULES, AUTO])
    parser.add_argument("--temperatures", type=of(float), default=[0.0, 0.8])
    parser.add_argument("--each", type=int, help="ways that each prompt goes through; all of them by default")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
