"""The command ``worker``: one stage on this machine, for drivers elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from flowspec.cli.options import Device, Threads, Verbose
from flowspec.cli.terminal import errors_in_one_line
from flowspec.config import CACHE_GB, LinkConfig
from flowspec.errors import UsageError

if TYPE_CHECKING:
    from flowspec.worker.door import Keys

_HERE, _EVERYWHERE = "127.0.0.1:7070", "0.0.0.0:7070"  # where to listen without keys, and with them
_MAX_TOKEN_LEN = 1000
Say: TypeAlias = "Callable[[str, str, bool], None]"  # endpoint, key, whether it waits to join


def worker(
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where to wait for a driver; port 0 is any free one.",
            show_default="0.0.0.0:7070 in a cluster, else 127.0.0.1:7070",
        ),
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            envvar="FLOWSPEC_JOIN",
            help="Join the cluster whose token this is, - reads it from standard input; see flowspec cluster.",
        ),
    ] = None,
    discover: Annotated[
        bool,
        typer.Option("--discover", help="Be found in the local network (mDNS) by drivers that are given --discover."),
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Of this device in the cluster.", show_default="the machine's")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let in anybody who reaches the address, without encryption.")
    ] = False,
    cache_gb: Annotated[
        float, typer.Option(help="Of the disk, for weights that drivers send; the oldest are dropped.", metavar="GB")
    ] = CACHE_GB,
    max_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="Of the device's memory, for all that this worker holds; larger stages are refused.",
            show_default="what is free",
        ),
    ] = None,
    threads: Threads = 0,
    device: Device = "cpu",
    verbose: Verbose = False,
) -> None:
    """Run a stage for drivers elsewhere, one at a time."""
    with errors_in_one_line(verbose, is_service=True), contextlib.ExitStack() as stack:
        from flowspec.model.loader import check_device
        from flowspec.wire.transport import is_local
        from flowspec.worker.memory import Allowance
        from flowspec.worker.serve import serve
        from flowspec.worker.sources import Sources

        logger = logging.getLogger("flowspec")
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        check_device(device)
        memory = Allowance(device, max_memory)
        say: Say | None = None
        if discover:
            listen = listen or _EVERYWHERE
            say = _announcer(listen, name, insecure, stack)
        # Where anybody may be the driver, nothing is downloaded on its word.
        sources = Sources(may_ask_hub=not insecure or is_local(listen or _HERE), cache_gb=cache_gb)
        listen, keys = _joined(listen, join, name, insecure, say)

        def tell(endpoint: str) -> None:
            logger.info("listening on %s; end it with Ctrl-C", endpoint)
            if say is not None and keys is not None:
                say(endpoint, keys.own.public, False)

        serve(
            listen,
            heartbeat_s=LinkConfig().heartbeat_s,
            threads=threads,
            device=device,
            announce=tell,
            keys=keys,
            sources=sources,
            memory=memory,
        )


def _announcer(listen: str, name: str | None, insecure: bool, stack: contextlib.ExitStack) -> Say:
    """What announces this worker, until the stack is left."""
    from flowspec.cluster.mdns import Announcer
    from flowspec.wire.transport import is_local
    from flowspec.worker.member import device_name

    if insecure:
        raise UsageError("give --discover or --insecure, not both: who is found is believed by a key alone")
    if is_local(listen):
        raise UsageError(f"{listen} is of this machine alone, and nobody finds it; give --listen 0.0.0.0:7070")
    announcer = Announcer(device_name(name))
    stack.callback(announcer.close)
    return announcer.say


def _joined(
    listen: str | None, join: str | None, name: str | None, insecure: bool, say: Say | None
) -> tuple[str, Keys | None]:
    """Where to listen, and by which keys; waits for the driver where it has not let this device join yet."""
    from flowspec.wire.key_file import state_folder
    from flowspec.wire.transport import is_local
    from flowspec.worker.door import Keys
    from flowspec.worker.member import Member, device_name

    if insecure:
        listen = listen or _HERE
        if join is not None:
            raise UsageError("give --join or --insecure, not both")
        if not is_local(listen):
            logging.getLogger("flowspec").warning(
                "warning: %s is open to the network without password or encryption; use it in networks that you trust",
                listen,
            )
        return listen, None
    member = Member.open(state_folder()) if join is None else Member.join(state_folder(), _token(join))
    if member is not None:

        def announce(endpoint: str) -> None:
            if say is not None and member.waits_with is not None:
                say(endpoint, member.waits_with, True)

        listen = member.await_driver(listen or _EVERYWHERE, device_name(name), announce)
        return listen, Keys(member.own, member.driver_key)
    listen = listen or _HERE
    if not is_local(listen):
        raise UsageError(
            f"{listen} is open to the network, and this device has joined no cluster: give --join with the token that "
            "flowspec cluster init prints on the driver; or --insecure, in a network that you trust"
        )
    return listen, None


def _token(join: str) -> str:
    """As given, or a line of standard input, where no list of processes shows it. Raises ``UsageError``."""
    if join != "-":
        return join
    if sys.stdin.isatty():
        logging.getLogger("flowspec").info("paste the token that flowspec cluster token prints, and press Enter")
    if not (line := sys.stdin.readline(_MAX_TOKEN_LEN).strip()):
        raise UsageError("no join token comes on standard input; flowspec cluster token prints one")
    return line
