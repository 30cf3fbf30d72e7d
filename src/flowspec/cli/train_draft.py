"""The command ``train-draft``: a draft head for a model of the user's own."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flowspec.cli.options import Threads, Verbose
from flowspec.cli.terminal import errors_in_one_line


class Kind(StrEnum):
    eagle = "eagle"
    eagle3 = "eagle3"
    eagle3_1 = "eagle3.1"
    block = "block"


def train_draft(
    target: Annotated[
        str, typer.Argument(help="The target model: a directory, a GGUF file, a hub name, 'demo' or 'smollm2'.")
    ],
    out: Annotated[Path, typer.Option(help="Where the head goes; generate finds it as MODEL/draft.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file or a directory of them; may be repeated. A chat model may do without: it converses with "
            "itself, and quotes the texts that are given.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(
            help="eagle3: an EAGLE-3 head, which reads three of the model's layers. eagle3.1: one with more norms, "
            "whose guesses get worse less with depth. block: a DSpark head, which guesses several tokens in one pass."
        ),
    ] = Kind.eagle,
    block_size: Annotated[int, typer.Option(help="Tokens that a block head guesses in a pass.")] = 8,
    layers: Annotated[int, typer.Option(help="Of a block head.")] = 2,
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            help="Tokens that an EAGLE-3 head guesses, the most frequent ones.",
            show_default="all, of a large vocabulary 16,384",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 15_000_000,
    generated_share: Annotated[
        float | None,
        typer.Option(help="Share of them that the target writes itself.", show_default="0.5, of a chat model 1"),
    ] = None,
    generated_tokens: Annotated[
        int | None,
        typer.Option(
            help="Distinct tokens among these; more are better, and take longer.",
            show_default="300,000, of a chat model a quarter of --tokens",
        ),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a training step; a GPU likes more.")] = 4096,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoints; a run that was interrupted goes on from there.", show_default="training in --out"
        ),
    ] = None,
    threads: Threads = 0,
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
    """Train a draft head for a target model."""
    with errors_in_one_line(verbose):
        logging.getLogger("flowspec").setLevel(logging.INFO)
        import torch

        from flowspec.errors import UsageError
        from flowspec.train.block import BlockShape
        from flowspec.train.draft import recipe_for
        from flowspec.train.draft import train_draft as train
        from flowspec.train.eagle3 import Eagle3Shape
        from flowspec.train.hints import HintRecipe

        if draft_vocab is not None and kind not in (Kind.eagle3, Kind.eagle3_1):
            raise UsageError("--draft-vocab is for EAGLE-3 heads; leave it out, or add --kind eagle3")
        if threads:
            torch.set_num_threads(threads)
        recipe = recipe_for(target, tokens, generated_share, generated_tokens, batch_tokens)
        hint_recipe = HintRecipe() if hints else None
        shape: BlockShape | Eagle3Shape | None = None
        match kind:
            case Kind.block:
                shape = BlockShape(block_size, layers)
            case Kind.eagle3:
                shape = Eagle3Shape(draft_vocab)
            case Kind.eagle3_1:
                shape = Eagle3Shape(draft_vocab, fc_norm=True, norm_output=True)
            case Kind.eagle:
                pass
        where = work_dir or out / "training"
        train(target, out, data or [], recipe, where, shape=shape, hints=hint_recipe, compiled=compiled)
