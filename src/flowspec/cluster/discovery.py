"""Which of the workers that were heard in the network are a cluster's devices, and where these are now.

What was heard says where to look, and no more: a device counts as found where somebody proves the key that it has
joined with, and one that waits to join where somebody proves that it has the token.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flowspec.cluster.device_list import DeviceList
from flowspec.cluster.mdns import BROWSE_S, Announcement, browse
from flowspec.cluster.membership import Device, Membership, proven
from flowspec.errors import UsageError
from flowspec.wire.messages import PROTOCOL_VERSION

logger = logging.getLogger("flowspec.cluster")

_PROVE_S = 2.0
_MAX_PLACES = 64  # where devices that have joined are looked for, and as many more for those that wait to
_MAX_TOLD = 5  # names in a message


@dataclass
class Heard:
    """The network, as one cluster's driver sees it."""

    found: dict[str, Device] = field(default_factory=dict)  # that have joined, by name
    waiting: list[tuple[Announcement, str]] = field(default_factory=list)  # to join by the token, and where
    strangers: list[str] = field(default_factory=list)  # names that others go by, who may be anybody


def look(membership: Membership, heard: Iterable[Announcement], timeout_s: float = _PROVE_S) -> Heard:
    """Who of them is whom. Devices with a new address have it in the ``membership`` from now on."""
    token_key = _token_key(membership)
    names = {device.key: name for name, device in membership.devices.items()}
    places: dict[str, list[str]] = {}  # where a device may be, by its name
    versions: dict[str, set[int]] = {}  # of the protocol, that it is said to speak
    waiting: list[Announcement] = []
    result = Heard()
    for one in heard:
        if not one.is_waiting and one.key in names:
            places.setdefault(names[one.key], []).extend(one.addresses)
            versions.setdefault(names[one.key], set()).add(one.version)
        elif one.is_waiting and one.key == token_key and len(waiting) < _MAX_PLACES:
            waiting.append(one)
        else:
            result.strangers.append(one.name)
    for name, addresses in places.items():  # the last known one first
        known = membership.devices[name].address
        places[name] = sorted(dict.fromkeys(addresses), key=lambda address: address != known)
    joined = [[(address, membership.devices[name].key) for address in found] for name, found in places.items()]
    waits = [[(address, one.key) for address in one.addresses] for one in waiting]
    wanted = {*_first(joined, _MAX_PLACES), *_first(waits, _MAX_PLACES)}
    there = proven(membership.own, wanted, timeout_s) if wanted else set()
    for name, addresses in places.items():
        device = membership.devices[name]
        if (address := next((one for one in addresses if (one, device.key) in there), None)) is not None:
            result.found[name] = Device(address, device.key)
            _tell_version(name, versions[name])
    for one in sorted(waiting, key=lambda one: one.name):
        if (address := next((place for place in one.addresses if (place, one.key) in there), None)) is not None:
            result.waiting.append((one, address))
    _note(membership, result.found)
    return result


def _first(lists: Iterable[Sequence[tuple[str, str]]], most: int) -> list[tuple[str, str]]:
    """So many: the first of each list, then the second of each, and so on."""
    turns = itertools.zip_longest(*lists)
    return list(itertools.islice((one for turn in turns for one in turn if one is not None), most))


def _token_key(membership: Membership) -> str | None:
    try:
        return membership.check_token().listener_key
    except UsageError:
        return None


def _tell_version(name: str, versions: Collection[int]) -> None:
    """The session's own check decides: this one believes what anybody says."""
    if PROTOCOL_VERSION not in versions:
        logger.warning(
            "%s announces protocol %d, and this driver speaks %d; install the same flowspec version on both",
            name, max(versions), PROTOCOL_VERSION,
        )  # fmt: skip


def _note(membership: Membership, found: Mapping[str, Device]) -> None:
    before_by_name = {name: device.address for name, device in membership.devices.items()}
    for name, device in found.items():
        if (before := before_by_name[name]) != device.address:
            membership.move(name, device)
            logger.info("%s is at %s now (%s before)", name, device.address, before or "nobody knew where")


def let_in(membership: Membership, heard: Heard) -> None:
    """Those that wait to join, as many as the token is for; they are found from now on."""
    for place, (one, address) in enumerate(heard.waiting):
        try:
            membership.check_token()
        except UsageError as error:
            logger.warning("%s: %s", _told([one.name for one, _ in heard.waiting[place:]]), error)
            return
        try:
            name = membership.let_join(address)
        except UsageError as error:
            logger.warning("%s cannot join: %s", one.name, error)
        else:
            heard.found[name] = membership.devices[name]


def find_workers(
    folder: Path,
    devices: DeviceList | None = None,
    workers: Sequence[str] | None = None,
    seconds: float = BROWSE_S,
    interfaces: Sequence[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Addresses in pipeline order, and names. ``folder``: of the driver's keys.

    ``devices`` or ``workers``, where given, say which devices, by their names or by where they were last; else it is
    all that are found, by name. Raises ``UsageError``.
    """
    if (membership := Membership.open(folder)) is None:
        raise UsageError("devices are found by their keys, and this driver has none yet: flowspec cluster init")
    known_at = {device.address: name for name, device in membership.devices.items()}
    heard = look(membership, browse(seconds, interfaces))
    let_in(membership, heard)
    for name, device in sorted(heard.found.items()):
        logger.info("found %s at %s", name, device.address)
    if heard.found and (missing := sorted(membership.devices.keys() - heard.found.keys())):
        is_all = devices is None and workers is None
        logger.log(logging.WARNING if is_all else logging.INFO, "not found: %s", _told(missing))
    if devices is not None:
        addresses = [
            _place(membership, name if name in membership.devices else known_at.get(address, name), address)
            for name, address in zip(devices.names, devices.addresses, strict=True)
        ]
        return addresses, list(devices.names)
    if workers is not None:
        names = [known_at.get(worker, worker) for worker in workers]
        return [_place(membership, *one) for one in zip(names, workers, strict=True)], names
    if not heard.found:
        raise UsageError(_nobody(heard, seconds))
    names = sorted(heard.found)
    return [heard.found[name].address for name in names], names


def find_workers_and_draft(
    folder: Path,
    devices: DeviceList | None,
    workers: Sequence[str] | None,
    draft: str | None,
    seconds: float = BROWSE_S,
    interfaces: Sequence[str] | None = None,
) -> tuple[list[str], list[str], str | None]:
    """As ``find_workers``; and where the device ``draft`` is, a name or an address: none of all that are found."""
    how = seconds, interfaces
    if draft is None:
        return *find_workers(folder, devices, workers, *how), None
    if workers is not None and devices is None:
        addresses, names = find_workers(folder, None, [*workers, draft], *how)
        return addresses[:-1], names[:-1], addresses[-1]
    addresses, names = find_workers(folder, devices, None, *how)
    found = dict(zip(names, addresses, strict=True)).get(draft, draft)
    if devices is not None:
        return addresses, names, found
    others = [(address, name) for address, name in zip(addresses, names, strict=True) if address != found]
    return [address for address, _ in others], [name for _, name in others], found


def _place(membership: Membership, name: str, address: str) -> str:
    """Where a device is, by what is known of it now, or else was written of it."""
    known = membership.devices.get(name)
    if known is not None and known.address:
        return known.address
    if ":" not in address:
        raise UsageError(
            f"{name} was not found: is it on, with flowspec worker --discover, and has it joined by that name "
            "(flowspec cluster status)? else give its address"
        )
    return address


def _nobody(heard: Heard, seconds: float) -> str:
    others = f"; heard {_told(heard.strangers)}, not of this cluster" if heard.strangers else ""
    return (
        f"no device of this cluster was found in {seconds:g} s{others}; start flowspec worker --discover on each, see "
        "that multicast (UDP port 5353) passes between here and there, or name their addresses with --workers"
    )


def _told(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_TOLD} more" if len(names) > _MAX_TOLD else ""
    return ", ".join(names[:_MAX_TOLD]) + more
