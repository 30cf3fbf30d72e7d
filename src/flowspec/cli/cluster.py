"""The command ``cluster``: which devices may be used, and by which keys they and this driver know each other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from flowspec.cli.terminal import errors_in_one_line
from flowspec.config import DEVICES_OF_A_TOKEN
from flowspec.errors import UsageError

if TYPE_CHECKING:
    from flowspec.cluster.membership import Membership

cluster = typer.Typer(no_args_is_help=True, help="The devices of this driver's cluster: join, list, remove.")

_MINUTES = typer.Option("--minutes", metavar="N", min=1, max=60 * 24 * 30, help="For which the token is valid.")
_DEVICES = typer.Option("--devices", metavar="N", min=1, max=1000, help="That may join by the token.")
_JOIN = """On each device, once: flowspec worker --join {token}
Then here: flowspec cluster add HOST:7070, or start with --workers or --cluster. In one local network --discover, there
and here, does without addresses. Valid for {minutes} minutes, for {devices} device(s).
Where others can see the list of processes: --join - reads it from standard input."""


@cluster.command()
def init(minutes: Annotated[int, _MINUTES] = 60, devices: Annotated[int, _DEVICES] = DEVICES_OF_A_TOKEN) -> None:
    """Make this driver's keys, unless it has some, and print a token by which devices join."""
    with errors_in_one_line(False):
        from flowspec.cluster.membership import Membership
        from flowspec.wire.key_file import state_folder

        membership = Membership.init(state_folder())
        _print_token(membership, minutes, devices)


@cluster.command()
def token(minutes: Annotated[int, _MINUTES] = 60, devices: Annotated[int, _DEVICES] = DEVICES_OF_A_TOKEN) -> None:
    """Print a new token; the one before is no longer valid."""
    with errors_in_one_line(False):
        _print_token(_opened(), minutes, devices)


@cluster.command()
def add(
    address: Annotated[str | None, typer.Argument(metavar="HOST:PORT", show_default=False)] = None,
    discover: Annotated[bool, typer.Option("--discover", help="All that wait in the local network (mDNS).")] = False,
) -> None:
    """Let the device join that waits there with the token."""
    with errors_in_one_line(False):
        if (address is None) != discover:
            raise UsageError("give the address where the device waits, or --discover")
        membership = _opened()
        if address is not None:
            typer.echo(f"{membership.let_join(address)} has joined")
            return
        membership.check_token()
        from flowspec.cluster.discovery import let_in, look
        from flowspec.cluster.mdns import browse

        heard, before = look(membership, browse()), set(membership.devices)
        let_in(membership, heard)
        for name in sorted(heard.found.keys() - before):
            typer.echo(f"{name} ({heard.found[name].address}) has joined")
        if not heard.waiting:
            typer.echo("nobody waits with the token; on each device: flowspec worker --discover --join TOKEN")


@cluster.command()
def status(
    discover: Annotated[
        bool, typer.Option("--discover", help="Look in the local network (mDNS) where they are now.")
    ] = False,
) -> None:
    """List the devices that have joined, and whether each one answers."""
    with errors_in_one_line(False):
        from flowspec.cluster.membership import answers

        membership = _opened()
        waiting, strangers = _look(membership) if discover else ([], 0)
        if not membership.devices:
            typer.echo("no device has joined; flowspec cluster token says how")
        for name, device in membership.devices.items():
            state = "answers" if answers(membership, device) else "does not answer, or has other keys"
            typer.echo(f"{name}  {device.address or 'nobody knows where'}  key {device.key[:8]}  {state}")
        for line in waiting:
            typer.echo(line)
        if strangers:
            typer.echo(f"{strangers} more in the network, not of this cluster")


def _look(membership: Membership) -> tuple[list[str], int]:
    """Devices that wait to join, a line each, and how many others there are; those that were found are noted."""
    from flowspec.cluster.discovery import look
    from flowspec.cluster.mdns import browse

    heard = look(membership, browse())
    return [f"{one.name}  {address}  waits to join" for one, address in heard.waiting], len(heard.strangers)


@cluster.command()
def remove(name: str) -> None:
    """Use a device no more. It still believes this driver; rotate-keys ends that for all devices."""
    with errors_in_one_line(False):
        _opened().remove(name)
        typer.echo(f"removed {name}")


@cluster.command("rotate-keys")
def rotate_keys() -> None:
    """Make new keys: no device knows this driver any more, and all have to join again."""
    with errors_in_one_line(False):
        membership = _opened()
        membership.rotate()
        typer.echo("new keys; flowspec cluster token prints a token by which devices join again")


def _print_token(membership: Membership, minutes: int, devices: int) -> None:
    token = membership.new_token(60 * minutes, devices)
    typer.echo(_JOIN.format(token=token, minutes=minutes, devices=devices))


def _opened() -> Membership:
    logging.getLogger("flowspec").setLevel(logging.WARNING)  # what is done is printed
    from flowspec.cluster.membership import Membership
    from flowspec.wire.key_file import state_folder

    membership = Membership.open(state_folder())
    if membership is None:
        raise UsageError("there is no cluster yet; make one with flowspec cluster init")
    return membership
