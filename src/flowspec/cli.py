"""The command line. Turns options into calls and errors into one line and an exit code; decides nothing else.

Exit codes: 0 done, 1 something failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flowspec import __version__
from flowspec.cli_bench import bench, simulate
from flowspec.cli_chat import chat
from flowspec.cli_common import SCHEDULE_NAMES, Dtype, TerminalProgress, Verbose, errors_in_one_line, stderr, stdout
from flowspec.cli_emulate import emulate
from flowspec.cli_serve import serve
from flowspec.config import EngineConfig, LinkConfig, PipelineConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.errors import FlowspecError, UsageError

if TYPE_CHECKING:
    from flowspec.llm import LLM, Completion

app = typer.Typer(
    help="One large language model over several small devices, fast for one user.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO_PROMPT = '''class Queue:
    """A first in, first out queue."""

    def __init__(self, maxsize=0):
'''


class DraftDtype(str, Enum):
    auto = "auto"
    int8 = "int8"


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="Read the prompt from a file instead; - reads standard input.")
    ] = None,
    model: Annotated[str, typer.Option(help="A model directory, a hub name (owner/model), or 'demo'.")] = "demo",
    draft: Annotated[
        str, typer.Option(help="auto, none, ngram, or the directory of an EAGLE head that fits the model.")
    ] = "auto",
    draft_dtype: Annotated[
        DraftDtype, typer.Option(help="Of a draft head's weights: auto is --dtype, int8 half as much to read.")
    ] = DraftDtype.auto,
    stages: Annotated[int | None, typer.Option(help="Stages to cut the model into, evenly.")] = None,
    partition: Annotated[str | None, typer.Option(help="The stages' layer ranges instead, as 0:4,4:8.")] = None,
    workers: Annotated[
        str | None, typer.Option(help="host:port,host:port,... of running workers, in pipeline order.")
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help=f"One of {SCHEDULE_NAMES}. ar: one token at a time; the others are speculative. auto: flow while "
            "that is faster."
        ),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the K likeliest tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and arithmetic; float32 is exact.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="Torch device of driver and local workers, as cpu or cuda:0.")] = "cpu",
    tree_top_k: Annotated[int, typer.Option(help="Children drafted for a node.")] = TreeConfig.top_k,
    tree_depth: Annotated[int, typer.Option(help="Levels drafted at once.")] = TreeConfig.depth,
    tree_size: Annotated[int, typer.Option(help="Nodes of the draft tree at most.")] = TreeConfig.size,
    min_probability: Annotated[
        float, typer.Option(help="Guesses that are reached less often, by the draft's own score, are not sent.")
    ] = TreeConfig.min_probability,
    segment_len: Annotated[
        int, typer.Option(help="Nodes in one segment of flow at most; 0: by the devices' costs.")
    ] = PipelineConfig.segment_len,
    int8_wire: Annotated[
        bool,
        typer.Option("--int8-wire", help="Send hidden states between workers in int8: for slow links; not bit-exact."),
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for workers to come up, or to answer.")
    ] = LinkConfig.stall_timeout_s,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt."""
    with errors_in_one_line(verbose):
        text = _read_prompt(prompt, prompt_file)
        params = SamplingParams(max_new_tokens, temperature, top_p, top_k, seed)
        tree = TreeConfig(
            tree_top_k, tree_depth, max_depth=2 * tree_depth, size=tree_size, min_probability=min_probability
        )
        progress = TerminalProgress()
        from flowspec.llm import LLM

        with contextlib.ExitStack() as stack:
            stack.callback(progress.stop)
            llm = stack.enter_context(
                LLM(
                    model,
                    draft=draft,
                    draft_dtype=draft_dtype.value,
                    stages=stages,
                    partition=partition,
                    workers=[address.strip() for address in workers.split(",")] if workers else None,
                    schedule=schedule,
                    dtype=dtype.value,
                    device=device,
                    tree=tree,
                    pipeline=PipelineConfig(segment_len=segment_len),
                    link=LinkConfig(start_timeout_s=timeout, stall_timeout_s=timeout, int8_wire=int8_wire),
                    progress=progress,
                )
            )
            if as_json:
                completion = llm.generate(text, params)
                _print_json(completion)
            else:
                completion = _stream(llm, text, params, progress)
                if stderr.is_terminal:
                    stderr.print(_table([completion]))


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


def _stream(llm: LLM, prompt: str, params: SamplingParams, progress: TerminalProgress) -> Completion:
    """Print the text as it comes."""
    chunk = None
    for chunk in llm.stream(prompt, params):
        progress.stop()
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    assert chunk is not None and chunk.completion is not None
    return chunk.completion


def _print_json(completion: Completion) -> None:
    import msgspec

    values = asdict(completion) | {"num_tokens": completion.num_tokens}
    values["tokens_per_s"] = round(completion.tokens_per_s, 2)
    values["ttft_ms"] = round(completion.ttft_ms, 2)
    sys.stdout.write(msgspec.json.encode(values).decode() + "\n")


def _table(completions: list[Completion]) -> Table:
    """One column for each run."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for completion in completions:
        table.add_column(completion.stats.schedule, justify="right")
    rows = {
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
    for name, cell in rows.items():
        table.add_row(name, *(cell(completion) for completion in completions))
    return table


@app.command()
def demo(
    stages: Annotated[int, typer.Option(help="Worker processes.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy; small models then repeat themselves.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 3,
    verbose: Verbose = False,
) -> None:
    """Continue a piece of code with the built-in model over local worker processes, and check the result."""
    with errors_in_one_line(verbose):
        progress = TerminalProgress()
        from flowspec.llm import LLM

        params = SamplingParams(max_new_tokens, temperature, seed=seed)
        with contextlib.ExitStack() as stack:
            stack.callback(progress.stop)
            llm = stack.enter_context(
                LLM("demo", stages=stages, config=EngineConfig(keeps_caches=False), progress=progress)
            )
            stdout.print(f"[dim]{stages} worker processes, layers {llm.partition}, and the driver[/dim]\n")
            progress.stop()
            stdout.print(f"[bold]{DEMO_PROMPT}[/bold]", end="")
            completion = _stream(llm, DEMO_PROMPT, params, progress)
            plain = llm.generate(DEMO_PROMPT, params, schedule="ar")
        stdout.print()
        stdout.print(_table([completion, plain]))
        if completion.token_ids != plain.token_ids:
            raise FlowspecError("the text is NOT the same as plain autoregressive decoding; please report this")
        stdout.print("\nThe text is the same as plain autoregressive decoding, token for token.")


@app.command()
def worker(
    listen: Annotated[str, typer.Option(help="HOST:PORT to wait on for a driver.")] = "127.0.0.1:7070",
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves the choice to torch.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device, as cpu or cuda:0.")] = "cpu",
    verbose: Verbose = False,
) -> None:
    """Wait for drivers and run a stage of a model for one at a time."""
    with errors_in_one_line(verbose):
        from flowspec.worker_process import serve

        logger = logging.getLogger("flowspec")
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        _warn_if_open(listen)
        serve(
            listen,
            heartbeat_s=LinkConfig().heartbeat_s,
            threads=threads,
            device=device,
            announce=lambda endpoint: logger.info("listening on %s; end it with Ctrl-C", endpoint),
        )


def _warn_if_open(listen: str) -> None:
    host = listen.rpartition(":")[0].strip("[]")
    if host.startswith("127.") or host in ("localhost", "::1"):
        return
    logging.getLogger("flowspec").warning(
        "warning: %s is open to the network without password or encryption; use it in networks that you trust", listen
    )


@app.command()
def train_draft(
    target: Annotated[str, typer.Argument(help="The target model: a directory, a hub name, or 'demo'.")],
    data: Annotated[list[Path], typer.Option(help="A text file or a directory of them; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Where the head goes; generate finds it as MODEL/draft.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 15_000_000,
    generated_share: Annotated[float, typer.Option(help="Share of them that the target writes itself.")] = 0.5,
    work_dir: Annotated[
        Path | None, typer.Option(help="Checkpoints; a run that was interrupted goes on from there. [OUT/training]")
    ] = None,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves the choice to torch.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Faster after some minutes; needs a C++ compiler.")
    ] = False,
    hints: Annotated[
        bool,
        typer.Option(
            "--hints",
            help="Also train hint heads, with which the workers between two layers guess the next token early. "
            "With the arguments and --work-dir of a finished run, trains these alone.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train an EAGLE draft head for a target model."""
    with errors_in_one_line(verbose):
        logging.getLogger("flowspec").setLevel(logging.INFO)
        import torch

        from flowspec.train.draft import train_draft as train
        from flowspec.train.eagle import DraftRecipe
        from flowspec.train.hints import HintRecipe

        if threads:
            torch.set_num_threads(threads)
        recipe = DraftRecipe(num_tokens=tokens, generated_share=generated_share)
        hint_recipe = HintRecipe() if hints else None
        train(target, out, data, recipe, work_dir or out / "training", hints=hint_recipe, compiled=compiled)


app.command()(simulate)
app.command()(bench)
app.command()(emulate)
app.command()(serve)
app.command()(chat)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flowspec {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One large language model over several small devices, fast for one user."""


def main() -> None:
    app()
