"""The command ``worker``: one stage on this machine, for drivers elsewhere."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from flowspec.cli.options import Device, Threads, Verbose
from flowspec.cli.terminal import errors_in_one_line
from flowspec.config import LinkConfig


def worker(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to wait for a driver; port 0 is any free one.")
    ] = "127.0.0.1:7070",
    threads: Threads = 0,
    device: Device = "cpu",
    verbose: Verbose = False,
) -> None:
    """Run a stage for drivers elsewhere, one at a time."""
    with errors_in_one_line(verbose, is_service=True):
        from flowspec.worker.process import serve

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
