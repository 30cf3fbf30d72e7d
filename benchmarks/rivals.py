"""flowspec against what its user would take instead: llama.cpp and transformers, on one file. Prints one JSON object.

    python benchmarks/rivals.py MODEL.gguf [--prompts FILE] [--num-prompts 20] [--max-new-tokens 128] [--threads 2]
        [--repeat 2] [--peer PYTHON]

All make the same number of tokens greedily from the same token ids, in turn, on the same cores; ends of text are
passed over. Each answer is told on stderr. llama.cpp runs in another Python (``--peer``) that has ``xllamacpp``, and
is left out without one. transformers has the same weights, dequantised. docs/METHODOLOGY.md defines the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flowspec.bench.local import encode
from flowspec.bench.prompts import read_prompts
from flowspec.config import EngineConfig
from flowspec.core import LayerRange, SamplingParams, Weights
from flowspec.errors import UsageError
from flowspec.llm import LLM
from flowspec.model.backends import load_stage, open_checkpoint
from flowspec.model.families import LM_HEAD
from flowspec.model.loader import Checkpoint
from flowspec.model.stage_weights import rotary_of
from flowspec.worker.measure import measure_forward

QUESTIONS = (
    "What is the difference between a virus and a bacterium?",
    "Write a short letter that asks a neighbour to water the plants during a holiday.",
    "Explain step by step how to find the greatest common divisor of 84 and 126.",
    "List five things to look at when buying a used bicycle, one line each.",
    "Correct this sentence and say what was wrong: 'Me and him goes to school yesterday.'",
    "Write a Python function that counts how often each word occurs in a text.",
)
FLOWSPEC: tuple[tuple[Weights, int, tuple[str, ...], bool], ...] = (  # weights, stages, schedules, remembers texts
    ("int8", 1, ("ar", "flow", "auto"), False),
    ("int8", 1, ("auto",), True),
    ("int8", 2, ("flow", "auto"), False),
    ("int4", 1, ("ar", "flow", "auto"), False),
    ("int4", 2, ("flow", "auto"), False),
    ("float", 1, ("ar",), False),
)
WARM_UP = "Say hello."  # none of the questions: who remembers texts would know the answer
SPECULATION = ("NGRAM_SIMPLE", "NGRAM_MOD")  # llama.cpp's own, with its default settings
PEER = Path(__file__).with_name("llama_peer.py")
TIMEOUT_S = 600  # of one answer of the peer, the loading of the model included
FORWARD_BUDGET_S = 4.0


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    tokens_per_s: float  # after the first emission
    mean_accepted: float | None = None  # of a schedule that drafts


@dataclass(frozen=True)
class Row:
    """One way to run the model."""

    name: str
    run: Callable[[Sequence[int]], Answer]
    same_as: str = ""  # rows that name the same here must make the same tokens


# --- flowspec ---


def open_flowspec(stack: ExitStack, model: str, num_tokens: int) -> Iterator[Row]:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    for weights, stages, schedules, remembers in FLOWSPEC:
        memory = {} if remembers else {"memory_tokens": 0}
        config = EngineConfig(keeps_caches=False, **memory)
        llm = stack.enter_context(LLM(model, stages=stages, weights=weights, config=config))
        threads = torch.get_num_threads()  # what its driver shares the cores by

        def run(prompt_ids: Sequence[int], schedule: str, llm: LLM = llm, threads: int = threads) -> Answer:
            torch.set_num_threads(threads)
            done = llm.generate(prompt_ids, params, schedule=schedule)
            return Answer(done.token_ids, done.tokens_per_s, done.stats.mean_accepted)

        for schedule in schedules:
            name = f"flowspec {schedule}, {weights}, {stages} {'stage' if stages == 1 else 'stages'}"
            name += ", with memory" if remembers else ""
            yield Row(name, lambda ids, run=run, schedule=schedule: run(ids, schedule), same_as=weights)


def measure_stage(checkpoint: Checkpoint, threads: int) -> dict[str, float]:
    """The whole model as one int8 stage, as a worker runs it."""
    torch.set_num_threads(threads)
    stage = load_stage(checkpoint, LayerRange(0, checkpoint.num_layers), "float32", "int8", "cpu")
    torch.set_num_threads(1)
    seconds = dict(measure_forward(stage, checkpoint.vocab_size, FORWARD_BUDGET_S))
    return {"1_row_ms": 1000 * seconds[1], "16_rows_ms": 1000 * seconds[16], "ratio": seconds[16] / seconds[1]}


# --- transformers ---


class EmissionClock:
    """A streamer of transformers' that keeps only when the first and the last token came."""

    def __init__(self) -> None:
        self._times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        self._times_s.append(time.perf_counter())

    def end(self) -> None: ...

    @property
    def decode_s(self) -> float:
        return self._times_s[-1] - self._times_s[1]


def open_transformers(checkpoint: Checkpoint, threads: int, num_tokens: int) -> Row:
    """In float32, with the tensors that flowspec reads from the file."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(checkpoint.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != LM_HEAD}
    tensors = dict(checkpoint.module_tensors(shapes, "float32", "cpu"))
    tensors[LM_HEAD] = checkpoint.load_lm_head("float32", "cpu")
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = rotary_of(model.model, checkpoint.config)
    model.eval()
    model.generation_config.eos_token_id = None  # nothing ends a text

    def run(prompt_ids: Sequence[int]) -> Answer:
        torch.set_num_threads(threads)
        ids, clock = torch.tensor([list(prompt_ids)]), EmissionClock()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        return Answer(output[0, len(prompt_ids) :].tolist(), (num_tokens - 1) / clock.decode_s)

    return Row("transformers generate, float32", run)


# --- llama.cpp ---


class LlamaPeer:
    """llama.cpp in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], told: Any) -> None:
        self._process = process
        self._told = told  # the file that has its stderr

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises ``UsageError`` where it has ended or does not answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            is_there = select.select([self._process.stdout], [], [], TIMEOUT_S)[0]
        except BrokenPipeError:
            is_there = True
        line = self._process.stdout.readline() if is_there else ""
        if not line:
            self._told.seek(0)
            last = self._told.read().strip().splitlines()[-1:]
            raise UsageError(f"llama.cpp gives no answer ({' '.join(last)}); --peer must be a Python with xllamacpp")
        return json.loads(line)


@contextmanager
def open_peer(python: str) -> Iterator[LlamaPeer]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Variables such as PYTHONPATH are ours, not the other Python's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([python, str(PEER)], stderr=told, env=environment, **pipes)
        try:
            yield LlamaPeer(process, told)
        finally:
            process.kill()
            process.communicate()


def llama_rows(peer: LlamaPeer, model: str, threads: int, num_tokens: int, context: int) -> Iterator[Row]:
    """The first one is what the others are compared with."""
    kinds = [(threads, "NONE"), *([(1, "NONE")] if threads > 1 else []), *((threads, kind) for kind in SPECULATION)]
    for num_threads, speculation in kinds:
        request = {"model": str(Path(model).resolve()), "threads": num_threads, "speculation": speculation}
        request |= {"num_tokens": num_tokens, "context": context}

        def run(prompt_ids: Sequence[int], request: dict[str, Any] = request) -> Answer:
            answer = peer.ask({**request, "prompt_ids": list(prompt_ids)})
            return Answer(answer["token_ids"], (len(answer["token_ids"]) - 1) / answer["decode_s"])

        name = f"llama.cpp, {num_threads} {'thread' if num_threads == 1 else 'threads'}"
        yield Row(name if speculation == "NONE" else f"{name}, {speculation.lower().replace('_', '-')}", run)


# --- figures ---


def num_leading(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def run_in_turn(
    rows: Sequence[Row], prompts: Sequence[Sequence[int]], repeat: int, warm_up: Sequence[int]
) -> dict[str, list[list[Answer]]]:
    """Answers by row, then prompt, then repetition. One prompt goes through all rows before the next one."""
    for row in rows:
        row.run(warm_up)
    answers: dict[str, list[list[Answer]]] = {row.name: [[] for _ in prompts] for row in rows}
    for _ in range(repeat):
        for index, prompt_ids in enumerate(prompts):
            for row in rows:
                answers[row.name][index].append(answer := row.run(prompt_ids))
                print(f"prompt {index}: {row.name}: {answer.tokens_per_s:.1f} tokens/s", file=sys.stderr, flush=True)
    return answers


def check_same_tokens(rows: Sequence[Row], answers: dict[str, list[list[Answer]]]) -> None:
    for kind in {row.same_as for row in rows if row.same_as}:
        first, *others = (row.name for row in rows if row.same_as == kind)
        for name in (first, *others):
            for expected, found in zip(answers[first], answers[name], strict=True):
                assert all(answer.token_ids == expected[0].token_ids for answer in found), f"{first} != {name}"


def figures_of(own: list[list[Answer]], base: list[list[Answer]] | None) -> dict[str, Any]:
    """``base``: of llama.cpp, where it was run; ratios are taken prompt by prompt and turn by turn."""
    figures: dict[str, Any] = {
        "tokens_per_s": statistics.median(answer.tokens_per_s for runs in own for answer in runs),
        # Who remembers texts knows each answer from the second turn on.
        "first_turn_tokens_per_s": statistics.median(runs[0].tokens_per_s for runs in own),
        "best_of_repeats": statistics.median(max(answer.tokens_per_s for answer in runs) for runs in own),
    }
    if own[0][0].mean_accepted is not None:
        figures["mean_accepted"] = statistics.mean(answer.mean_accepted or 0.0 for runs in own for answer in runs)
    if base is not None:
        pairs = [pair for runs in zip(own, base, strict=True) for pair in zip(*runs, strict=True)]
        figures["ratio_to_llama_cpp"] = statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
        firsts = zip(own, base, strict=True)
        figures["first_turn_ratio"] = statistics.median(a[0].tokens_per_s / b[0].tokens_per_s for a, b in firsts)
        leading = [num_leading(a.token_ids, b.token_ids) for a, b in pairs]
        figures["leading_tokens_as_llama_cpp"] = statistics.median(leading)
    return figures


def read_questions(path: str | None, num: int) -> list[str]:
    return [prompt.turns[0] for prompt in read_prompts(path, num)] if path else list(QUESTIONS[:num])


def restrict_cores(num: int) -> None:
    """flowspec takes all cores that it may use, so that it may use no more than the others."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num:
        raise UsageError(f"--threads {num}: only {len(cores)} cores may be used here; give {len(cores)} at most")
    os.sched_setaffinity(0, cores[:num])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--prompts", help="a file as flowspec bench reads it; of conversations the first turns")
    parser.add_argument(
        "--num-prompts", type=int, default=20, help=f"of the file; without one at most {len(QUESTIONS)}"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="cores, shared by all that a row starts")
    parser.add_argument("--repeat", type=int, default=2, help="times that all prompts are run")
    parser.add_argument("--peer", help="a Python that has xllamacpp")
    arguments = parser.parse_args()
    num_tokens = arguments.max_new_tokens
    restrict_cores(arguments.threads)
    checkpoint = open_checkpoint(arguments.model)
    stage = measure_stage(checkpoint, arguments.threads)
    with ExitStack() as stack:
        with LLM(arguments.model, stages=1, in_process=True, weights="int8") as llm:
            prompts = [encode(llm, text) for text in read_questions(arguments.prompts, arguments.num_prompts)]
            warm_up = encode(llm, WARM_UP)
        base: str | None = None
        rows: list[Row] = []
        if arguments.peer:
            context = -(-(max(map(len, prompts)) + num_tokens + 64) // 256) * 256
            peer = stack.enter_context(open_peer(arguments.peer))
            rows += llama_rows(peer, arguments.model, arguments.threads, num_tokens, context)
            base = rows[0].name
        rows += open_flowspec(stack, arguments.model, num_tokens)
        rows.append(open_transformers(checkpoint, arguments.threads, num_tokens))
        answers = run_in_turn(rows, prompts, arguments.repeat, warm_up)
    check_same_tokens(rows, answers)
    figures = {
        "model": checkpoint.title,
        "threads": arguments.threads,
        "num_prompts": len(prompts),
        "prompt_tokens": statistics.median(map(len, prompts)),
        "max_new_tokens": num_tokens,
        "repeat": arguments.repeat,
        "rows": {name: figures_of(own, answers[base] if base else None) for name, own in answers.items()},
        "int8_stage": stage,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
