"""An actor in virtual time inside a real process: it sleeps until the wall clock has caught up with what it did.

Messages carry the virtual time at which they arrive, and what happens when is decided by these stamps alone. So a late
wake-up of one process is not passed on to the others: it only shows as a lag of the wall clock, which is reported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch

from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.virtual_time import Clock, EmulatedHinter, EmulatedStage, Place, Sizes, VirtualLink
from flowspec.errors import ProtocolError
from flowspec.model.stage import Stage, forward
from flowspec.model.taps import Taps
from flowspec.wire.actor import Actor, Route, Send
from flowspec.wire.messages import Emulation, Message, Segment, Stamped
from flowspec.worker.actor import PATIENCE_S, Worker
from flowspec.worker.hints import NUM_GUESSES, Hinter

_POLL_S = 0.0015  # waits below this are slept, since polling knows whole milliseconds only


class WallClock:
    """Virtual seconds since the emulation began."""

    def __init__(self, start_s: float, time_scale: float) -> None:
        """``start_s`` on the monotonic clock, which all processes of a machine share."""
        self._start_s = start_s
        self._time_scale = time_scale

    def now(self) -> float:
        return (time.monotonic() - self._start_s) / self._time_scale

    def monotonic_s(self, virtual_s: float) -> float:
        return self._start_s + virtual_s * self._time_scale

    def sleep_until(self, virtual_s: float) -> None:
        wait_s = self.monotonic_s(virtual_s) - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


class PacedActor:
    """Takes and sends ``Stamped`` messages; otherwise what its shell expects of a worker or driver."""

    def __init__(
        self, actor: Actor, clock: Clock, wall: WallClock, links: Mapping[Route, VirtualLink], sizes: Sizes
    ) -> None:
        self.link_bytes = 0  # the shell's count of real bytes, of which nobody asks
        self.lag_s = 0.0  # the largest, in virtual seconds, here and wherever messages came from
        self.place = Place(actor, clock)
        self._wall = wall
        self._links = links
        self._sizes = sizes

    @property
    def wake_s(self) -> float:
        """On the monotonic clock."""
        return self._wall.monotonic_s(self.place.next_s)

    def on_message(self, message: Message) -> list[Send]:
        """Keep it until its time has come."""
        if not isinstance(message, Stamped):
            raise ProtocolError(f"an emulated worker takes no {type(message).__name__} without a time stamp")
        self.lag_s = max(self.lag_s, message.lag_s)
        self.place.deliver(message.arrival_s, message.message)
        return []

    def on_idle(self) -> list[Send] | None:
        """Do the next thing if its time has come, and return when it is over; ``None`` when there is none yet."""
        wait_s = self.wake_s - time.monotonic()
        if wait_s > _POLL_S:
            return None
        self._wall.sleep_until(self.place.next_s)
        sends = self.place.run()
        self.lag_s = max(self.lag_s, self._wall.now() - self.place.clock.now)
        self._wall.sleep_until(self.place.clock.now)
        return self.stamp(sends)

    def stamp(self, sends: list[Send]) -> list[Send]:
        """With the time at which each arrives if it leaves now."""
        stamped: list[Send] = []
        for send in sends:
            message: Any = send.message
            arrival_s = self._links[send.route].arrival_s(self.place.clock.now, self._sizes.num_bytes(message))
            stamped.append(Send(send.route, Stamped(arrival_s, self.lag_s, message)))
        return stamped


def paced_worker(
    stage: Stage, index: int, emulation: Emulation, hinter: Hinter | None = None, taps: Taps | None = None
) -> PacedActor:
    """A worker that plays the cluster's device ``index`` (from 1)."""
    _warm_up(stage)
    cluster = ClusterDescription.parse(emulation.cluster, "the emulated cluster")
    clock = Clock()
    sizes = Sizes(cluster.model)
    out = cluster.links[index]
    link = VirtualLink(out, (out.latency_ms + emulation.hop_ms) / 1000, Random(index))
    num_taps = 0 if taps is None else taps.num_blocks
    stage_s = partial(cluster.stage_s, index - 1)
    emulated = EmulatedStage(
        stage, index, clock, lambda rows, context, now, taps: stage_s(rows, context, taps), num_taps
    )
    if hinter is not None:
        hinter.guess(torch.zeros(16, stage.hidden_size), NUM_GUESSES)  # warms it up
        hinter = EmulatedHinter(hinter, index, clock, cluster.devices[index - 1].hint_s(cluster.model))
    patience_s = PATIENCE_S if emulation.cancels else None
    worker = CountingWorker(
        emulated,
        index,
        clock,
        patience_s,
        hinter,
        forward_s=lambda rows: stage_s(rows, 0),
        taps=taps,
    )
    worker.sizes = sizes
    wall = WallClock(emulation.start_s, emulation.time_scale)
    hints = VirtualLink(cluster.control, cluster.control.latency_ms / 1000, Random(-index))
    to_driver = link if stage.is_last else hints
    return PacedActor(worker, clock, wall, {Route.NEXT: link, Route.DRIVER: to_driver}, sizes)


def _warm_up(stage: Stage) -> None:
    """The first forwards of a process are slow; they must not count as lag."""
    cache = stage.open_cache()
    for num_rows in (1, 16, 81):
        slots = cache.slots.append_prefix(np.arange(num_rows))
        shape = (num_rows,) if stage.is_first else (num_rows, stage.hidden_size)
        forward(stage, torch.zeros(shape, dtype=torch.long), slots, cache)


class CountingWorker(Worker):
    """Counts the emulated bytes that it receives, which its timings report."""

    sizes: Sizes

    def on_message(self, message: Message) -> list[Send]:
        if isinstance(message, Segment):
            self.link_bytes += self.sizes.num_bytes(message)
        return super().on_message(message)
