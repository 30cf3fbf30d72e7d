"""The command line: which commands there are. Each turns options into calls, and errors into one line and an exit code.

Exit codes: 0 done, as is a worker, a server or a chat that was told to end; 1 something failed; 2 the user's mistake;
130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flowspec import __version__
from flowspec.cli.bench import bench
from flowspec.cli.chat import chat
from flowspec.cli.cluster import cluster
from flowspec.cli.demo import demo
from flowspec.cli.emulate import emulate
from flowspec.cli.generate import generate
from flowspec.cli.groups import takes_groups
from flowspec.cli.models import models
from flowspec.cli.options import SCHEDULES_BELOW
from flowspec.cli.serve import serve
from flowspec.cli.simulate import simulate
from flowspec.cli.train_draft import train_draft
from flowspec.cli.worker import worker

# Plain help: Rich would take ``[driver.ours]`` for markup.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

for command in (generate, demo, chat, serve, worker, simulate, bench, emulate, train_draft):
    compares = command in (simulate, bench)
    app.command(epilog=SCHEDULES_BELOW if compares else None)(takes_groups(command))
app.add_typer(models, name="models")
app.add_typer(cluster, name="cluster")


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
    app(prog_name="flowspec")
