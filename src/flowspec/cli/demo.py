"""The command ``demo``: the built-in model, and a check that its text is right."""

from __future__ import annotations

import contextlib

from flowspec.cli.generate import completion_cells, print_stream
from flowspec.cli.options import DEFAULT_STAGE_OPTIONS, SamplingOptions, StageOptions, Verbose
from flowspec.cli.terminal import TerminalProgress, errors_in_one_line, print_table, stdout
from flowspec.config import EngineConfig
from flowspec.core import SamplingParams
from flowspec.errors import FlowspecError

DEMO_PROMPT = '''class Queue:
    """A first in, first out queue."""

    def __init__(self, maxsize=0):
'''
_DEFAULTS = SamplingOptions.of(SamplingParams(200, 0.8, seed=3))  # greedy, small models repeat themselves


def demo(
    stage_options: StageOptions = DEFAULT_STAGE_OPTIONS,
    sampling: SamplingOptions = _DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Continue some code with the built-in model, and check it."""
    with errors_in_one_line(verbose), contextlib.ExitStack() as stack:
        progress = TerminalProgress()
        params = SamplingParams(**sampling.given())
        arguments = stage_options.arguments()
        from flowspec.llm import LLM

        stack.callback(progress.stop)
        llm = stack.enter_context(LLM("demo", **arguments, config=EngineConfig(keeps_caches=False), progress=progress))
        progress.stop()
        where = "worker processes" if arguments["workers"] is None else "workers"
        stdout.print(f"[dim]{len(llm.partition)} {where}, layers {llm.partition}, and the driver[/dim]\n")
        stdout.print(f"[bold]{DEMO_PROMPT}[/bold]", end="")
        completion = print_stream(llm, DEMO_PROMPT, params, progress)
        plain = llm.generate(DEMO_PROMPT, params, schedule="ar")
        stdout.print()
        print_table(completion_cells([completion, plain]))
        if completion.token_ids != plain.token_ids:
            raise FlowspecError("the text is NOT the same as plain autoregressive decoding; please report this")
        stdout.print("\nThe text is the same as plain autoregressive decoding, token for token.")
