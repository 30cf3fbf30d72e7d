"""The command ``generate``: a prompt is continued once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowspec.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_SAMPLING,
    DEFAULT_STAGE_OPTIONS,
    AsJson,
    ModelOptions,
    SamplingOptions,
    StageOptions,
    Verbose,
)
from flowspec.cli.terminal import TerminalProgress, errors_in_one_line, print_table, stderr, write_json
from flowspec.core import SamplingParams
from flowspec.errors import UsageError

if TYPE_CHECKING:
    from flowspec.llm import Completion, TextChunk

_DEFAULTS = replace(DEFAULT_SAMPLING, max_new_tokens=SamplingParams.max_tokens)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.", show_default=False)] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from a file instead; - reads standard input.")
    ] = None,
    model: ModelOptions = DEFAULT_MODEL,
    stage_options: StageOptions = DEFAULT_STAGE_OPTIONS,
    sampling: SamplingOptions = _DEFAULTS,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt."""
    with errors_in_one_line(verbose), contextlib.ExitStack() as stack:
        text = _read_prompt(prompt, prompt_file)
        SamplingParams(**sampling.given())  # what is wrong is said before anything is loaded
        arguments = model.arguments() | stage_options.arguments(model.draft_worker)
        progress = TerminalProgress()
        from flowspec.llm import LLM

        stack.callback(progress.stop)
        llm = stack.enter_context(LLM(**arguments, progress=progress))
        params = SamplingParams(**llm.checkpoint.sampling_defaults | sampling.given())
        if as_json:
            completion = _read(llm.stream(text, params), params, progress)
            progress.stop()
            values = asdict(completion) | {"num_tokens": completion.num_tokens}
            values["tokens_per_s"] = round(completion.tokens_per_s, 2)
            values["ttft_ms"] = round(completion.ttft_ms, 2)
            write_json(values)
        else:
            completion = print_stream(llm.stream(text, params), progress)
            if stderr.is_terminal:
                print_table(completion_cells([completion]), stderr)


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give a prompt, or --prompt-file, and not both")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        return sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompt from {prompt_file}: {error}") from None


def _read(chunks: Iterator[TextChunk], params: SamplingParams, progress: TerminalProgress) -> Completion:
    num_tokens, chunk = 0, None
    for chunk in chunks:
        num_tokens += len(chunk.token_ids)
        progress("generating", num_tokens / params.max_tokens)
    assert chunk is not None and chunk.completion is not None
    return chunk.completion


def print_stream(chunks: Iterator[TextChunk], progress: TerminalProgress) -> Completion:
    """Print the text as it comes."""
    chunk = None
    for chunk in chunks:
        progress.stop()
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    assert chunk is not None and chunk.completion is not None
    return chunk.completion


def completion_cells(completions: list[Completion]) -> list[list[str]]:
    """One column for each run."""
    rows = {
        "": lambda c: c.stats.schedule,
        "tokens": lambda c: str(c.num_tokens),
        "tokens/s": lambda c: f"{c.tokens_per_s:.1f}",
        "time to first token, ms": lambda c: f"{c.ttft_ms:.0f}",
        "segments": lambda c: str(c.stats.segments),
        "drafted": lambda c: str(c.stats.drafted),
        "accepted": lambda c: str(c.stats.accepted),
        "mean accepted per verified segment": lambda c: f"{c.stats.mean_accepted:.2f}",
        "restarts": lambda c: str(c.stats.restarts),
        "bytes on the links": lambda c: f"{c.stats.link_bytes:,}",
    }
    return [[name, *(cell(completion) for completion in completions)] for name, cell in rows.items()]
