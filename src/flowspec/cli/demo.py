"""The command ``demo``: a model answers, or the toy that ships writes code; and a check that the text is right."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowspec.cli.generate import completion_cells, print_stream
from flowspec.cli.options import DEFAULT_STAGE_OPTIONS, SamplingOptions, StageOptions, Verbose
from flowspec.cli.terminal import TerminalProgress, errors_in_one_line, print_table, stdout
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.errors import FlowspecError, ModelError
from flowspec.model.demo_pair import DEMO
from flowspec.model.fetched import FETCHED, SMOLLM2, fetch

if TYPE_CHECKING:
    from flowspec.llm import LLM, Completion

DEMO_PROMPT = '''class Queue:
    """A first in, first out queue."""

    def __init__(self, maxsize=0):
'''
QUESTION = "Explain in simple words why the sky is blue."
_DEFAULTS = SamplingOptions(seed=3)


class DemoModel(StrEnum):
    smollm2 = SMOLLM2
    demo = DEMO


@dataclass(frozen=True)
class Scene:
    """What a model is asked, and how."""

    model: str
    title: str
    schedule: str
    defaults: dict[str, Any]  # of ``SamplingParams``
    remark: str = ""

    def play(self, llm: LLM, params: SamplingParams, progress: TerminalProgress) -> list[Completion]:
        """Once as it comes, by the schedule, and once more by plain decoding."""
        if self.model == DEMO:
            stdout.print(DEMO_PROMPT, style="bold", end="", markup=False)
            fast = print_stream(llm.stream(DEMO_PROMPT, params, schedule=self.schedule), progress)
            return [fast, llm.generate(DEMO_PROMPT, params, schedule="ar")]
        stdout.print(f"{QUESTION}\n", style="bold", markup=False)
        messages = [{"role": "user", "content": QUESTION}]
        fast = print_stream(llm.stream_chat(messages, params, schedule=self.schedule), progress)
        return [fast, llm.chat(messages, params, schedule="ar")]


# Greedy, a toy repeats itself.
TOY = Scene(DEMO, "the toy that ships", "auto", {"max_tokens": 200, "temperature": 0.8})
# By ``auto`` the columns would be the same: without a head of its own it gives way to plain decoding.
TALK = Scene(
    SMOLLM2,
    FETCHED[SMOLLM2].title,
    "flow",
    {"max_tokens": 64},
    "It was drafted from n-grams alone, which guess little here; --model demo shows what a draft head brings.",
)


def demo(
    model: Annotated[
        DemoModel | None,
        typer.Option(
            help="smollm2 answers a question, and is fetched first; demo is a toy that writes code.",
            show_default="smollm2, and demo where that cannot be fetched",
        ),
    ] = None,
    stage_options: StageOptions = DEFAULT_STAGE_OPTIONS,
    sampling: SamplingOptions = _DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """See a model answer, and check its text."""
    with errors_in_one_line(verbose), contextlib.ExitStack() as stack:
        progress = TerminalProgress()
        stack.callback(progress.stop)
        given, arguments = sampling.given(), stage_options.arguments()
        scene = _choose(model, progress)
        params = SamplingParams(**scene.defaults | given)
        from flowspec.llm import LLM

        config = EngineConfig(keeps_caches=False, memory_tokens=0)
        llm = stack.enter_context(LLM(scene.model, **arguments, config=config, progress=progress))
        progress.stop()
        where = "worker processes" if arguments["workers"] is None else "workers"
        told = f"{scene.title}: {len(llm.partition)} {where}, layers {llm.partition}, and the driver\n"
        stdout.print(told, style="dim", markup=False, soft_wrap=True)
        completions = scene.play(llm, params, progress)
        stdout.print()
        print_table(completion_cells(completions))
        fast, plain = completions
        if fast.token_ids != plain.token_ids:
            raise FlowspecError("the text is NOT the same as plain autoregressive decoding; please report this")
        stdout.print("\nThe text is the same as plain autoregressive decoding, token for token.")
        if scene.remark:
            stdout.print(scene.remark, style="dim", markup=False, soft_wrap=True)


def _choose(model: DemoModel | None, progress: TerminalProgress) -> Scene:
    """What was asked for must be there; where nothing was, there is always the toy."""
    if model is DemoModel.demo:
        return TOY
    try:
        if not FETCHED[SMOLLM2].is_cached:
            fetch(SMOLLM2, progress)
    except ModelError as error:
        if model is not None:
            raise
        progress.stop()
        print(f"flowspec: {error}; this is the toy that ships", file=sys.stderr)
        return TOY
    progress.stop()
    return TALK
