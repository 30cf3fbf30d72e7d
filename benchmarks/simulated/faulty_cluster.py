"""Devices that die, hang, restart and lose their links, on a clock of their own; and connections to them."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from flowspec.cluster.bring_up import BringUp
from flowspec.cluster.connections import LoadProgress
from flowspec.cluster.launcher import Launcher
from flowspec.cluster.trips import Trip
from flowspec.emulation.pairs import SyntheticPair
from flowspec.engine.pipeline import PipelineSpec
from flowspec.engine.recovery import MAX_LOSSES
from flowspec.errors import WorkerEndedError, WorkerError
from flowspec.wire.actor import Send
from flowspec.wire.messages import LOADED, Loading, Ready, ToDriver
from flowspec.wire.transport import DRIVER, InprocNetwork, Link
from flowspec.worker.actor import Worker

KINDS = ("kill", "stop", "cut", "gone")  # gone: for good, where others can take over
_FOREVER = float("inf")
_STEP_S = 0.004  # of the clock between two looks at the connections, on average
_LONGEST_STEP_S = 0.05
_FORWARD_S = [(1, 1e-6), (8, 2e-6), (64, 1e-5)]


@dataclass
class Device:
    """With a worker's process."""

    address: str
    state: Literal["up", "dead", "stopped", "cut"] = "up"
    since_s: float = 0.0
    until_s: float = _FOREVER  # when it is up again
    started_s: float = 0.0
    life: int = 0  # counts its processes
    layers: str = ""  # that it has loaded
    num_faults: int = 0  # since the last token
    told: int = 0  # the life whose end the launcher has told of


@dataclass
class FaultyCluster:
    random: Random
    num_devices: int
    is_local: bool  # processes of the driver's machine, which are started again there
    now_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.devices = [Device(f"10.0.0.{number}:7070") for number in range(1, self.num_devices + 1)]
        self._faults: list[tuple[float, str]] = []  # when, and what, soonest first

    @property
    def addresses(self) -> list[str]:
        return [device.address for device in self.devices]

    def clock(self) -> float:
        return self.now_s

    def plan_faults(self, number: int) -> None:
        """Soon after each other, so that some come in the recovery from others."""
        random, when_s = self.random, self.now_s
        for _ in range(number):
            when_s += random.expovariate(1 / random.choice([0.02, 0.2, 2.0]))
            self._faults.append((when_s, random.choice(KINDS)))

    def note_progress(self) -> None:
        for device in self.devices:
            device.num_faults = 0

    def sleep(self, seconds: float) -> None:
        """Time passes, and what is due happens."""
        self.now_s += seconds
        for device in self.devices:
            if device.until_s <= self.now_s:
                self._bring_back(device)
        while self._faults and self._faults[0][0] <= self.now_s:
            self._hit(self._faults.pop(0)[1])

    def _bring_back(self, device: Device) -> None:
        if device.state == "dead":
            self.start(device)
        device.state, device.until_s = "up", _FOREVER

    def start(self, device: Device) -> None:
        device.state, device.until_s, device.started_s, device.layers = "up", _FOREVER, self.now_s, ""
        device.life += 1

    def _hit(self, kind: str) -> None:
        """One device, unless it has been hit so often that it would look like a crash loop."""
        random, device = self.random, self.random.choice(self.devices)
        if device.state != "up" or device.num_faults > MAX_LOSSES - 2:
            return
        num_there = sum(other.until_s < _FOREVER or other.state == "up" for other in self.devices)
        if kind == "gone" and (self.is_local or num_there < 2):
            kind = "kill"
        if kind == "cut" and self.is_local:
            kind = "stop"  # there is no cable
        device.num_faults += 1
        device.since_s = self.now_s
        self.counts[kind] += 1
        length_s = random.choice([0.2, 2.0, 8.0]) * random.random()
        if kind in ("kill", "gone"):
            device.state, device.layers = "dead", ""
            device.until_s = _FOREVER if kind == "gone" else self.now_s + length_s
        else:
            device.state = "stopped" if kind == "stop" else "cut"
            # A process here that stands still does so until it is replaced.
            device.until_s = _FOREVER if self.is_local else self.now_s + length_s


class LocalLauncher:
    """As ``LocalProcesses``: who ends is started again, and told of once; who stands still is replaced on demand."""

    security = None

    def __init__(self, cluster: FaultyCluster) -> None:
        self._cluster = cluster
        self.addresses: Sequence[str] = cluster.addresses

    def check(self) -> None:
        ended = []
        for stage, device in enumerate(self._cluster.devices, start=1):
            life = device.life + (device.state == "dead")  # ended so often
            if life > device.told:
                device.told = life
                ended.append(stage)
        if ended:
            raise WorkerEndedError(f"workers {ended} ended unexpectedly", ended)

    def age_s(self, stage: int) -> float | None:
        device = self._cluster.devices[stage - 1]
        return None if device.state == "dead" else self._cluster.now_s - device.started_s

    def replace(self, stages: Sequence[int]) -> None:
        for stage in stages:
            device = self._cluster.devices[stage - 1]
            if device.state != "dead":
                self._cluster.start(device)
        for device in self._cluster.devices:
            device.told = device.life + (device.state == "dead")

    def close(self) -> None:
        """They are played."""


class PlayedConnections:
    """As ``RemoteConnections``, to devices of a ``FaultyCluster``."""

    def __init__(
        self, cluster: FaultyCluster, pair: SyntheticPair, spec: PipelineSpec, launcher: Launcher, heartbeat_s: float
    ) -> None:
        """``heartbeat_s``: a device that does not answer for so long is lost."""
        self._cluster = cluster
        self._launcher = launcher
        self._heartbeat_s = heartbeat_s
        by_address = {device.address: device for device in cluster.devices}
        self._devices = [by_address[address] for address in launcher.addresses]
        self._lives = [device.life for device in self._devices]
        self._layers = [str(layers) for layers in spec.partition.stages]
        self._loaded_s: dict[int, float] = {}  # when a stage will have been loaded, by stage
        stages = pair.make_stages(len(self._devices))
        self._workers = [
            Worker(stage, index, time.perf_counter, patience_s=0.0, hinter=pair.make_hinter(index, len(stages)))
            for index, stage in enumerate(stages, start=1)
        ]
        self._network = InprocNetwork(len(self._devices))
        self._idle: set[int] = set()  # places that had no work when last asked, and have got no message since
        self.bring_up = BringUp(len(self._devices), cluster.now_s)
        self.trips: Mapping[int, Trip] = {}

    @property
    def link_bytes(self) -> int:
        return self._network.num_bytes

    # --- coming up ---

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        while (ready := self.poll_ready(progress, 0.1)) is None:
            pass
        return ready

    def poll_ready(self, progress: LoadProgress, timeout_s: float) -> list[Ready] | None:
        cluster = self._cluster
        cluster.sleep(cluster.random.random() * timeout_s)
        self._check(self.bring_up.heard)
        for stage, device in enumerate(self._devices, start=1):
            if stage not in self.bring_up.heard:
                if device.state == "up" and cluster.random.random() < 0.7:
                    self._lives[stage - 1] = device.life
                    self.bring_up.note(stage, Loading(0.0), cluster.now_s)
                    takes_s = 0.0 if device.layers == self._layers[stage - 1] else cluster.random.random() * 3
                    device.layers, self._loaded_s[stage] = "", cluster.now_s + takes_s
            elif device.state == "up" and cluster.now_s >= self._loaded_s[stage]:
                device.layers = self._layers[stage - 1]
                self.bring_up.note(stage, Loading(LOADED), cluster.now_s)
        if len(self._loaded_s) == len(self._devices) and all(
            device.layers == layers for device, layers in zip(self._devices, self._layers, strict=True)
        ):
            for stage in self._loaded_s:
                self.bring_up.note(stage, Ready(stage, 0, 0, _FORWARD_S), cluster.now_s)
        return self.bring_up.ready

    def check_silent(self, silent: Sequence[int]) -> None:
        if silent:
            raise WorkerError(f"no sign of workers {silent}", silent)

    def is_up(self, stage: int) -> bool:
        return stage in self.bring_up.heard

    # --- at work ---

    def _check(self, stages: Iterable[int]) -> None:
        """Raises ``WorkerError`` for those of which it is noticed that they are lost."""
        self._launcher.check()
        now_s = self._cluster.now_s
        for stage in stages:
            device = self._devices[stage - 1]
            is_late = device.state != "up" and now_s - device.since_s > self._heartbeat_s
            # A process that has ended is noticed at once, as long as its machine says so.
            is_told = device.state == "dead" and self._cluster.random.random() < 0.1
            if device.life != self._lives[stage - 1] or is_late or is_told:
                raise WorkerError(f"lost worker {stage} ({device.address}, {device.state})", [stage])

    def send(self, sends: Iterable[Send]) -> None:
        self._network.post(DRIVER, sends)

    def probe(self) -> None:
        """Nobody measures."""

    def receive(self, timeout_s: float) -> list[ToDriver]:
        """Some messages arrive, some workers work, in any order."""
        cluster = self._cluster
        cluster.sleep(min(_LONGEST_STEP_S, cluster.random.expovariate(1 / _STEP_S)))
        self._check(range(1, len(self._devices) + 1))
        received: list[Any] = []
        for _ in range(cluster.random.randint(1, 12)):
            events: list[Any] = [link for link in self._network.waiting() if self._carries(link)]
            events += [place for place in range(1, len(self._workers) + 1) if self._works(place)]
            if not events:
                break
            event = cluster.random.choice(events)
            if isinstance(event, Link):
                message = self._network.take(event)
                if event.target == DRIVER:
                    received.append(message)
                elif self._state(event.target) != "dead":
                    self._idle.discard(event.target)
                    self._network.post(event.target, self._workers[event.target - 1].on_message(message))
            elif (sends := self._workers[event - 1].on_idle()) is not None:
                self._network.post(event, sends)
            else:
                self._idle.add(event)
        return received

    def _state(self, place: int) -> str:
        return "up" if place == DRIVER else self._devices[place - 1].state

    def _works(self, place: int) -> bool:
        return place not in self._idle and self._state(place) in ("up", "cut")

    def _carries(self, link: Link) -> bool:
        """Whether a message may arrive; what is sent to the dead is lost."""
        source, target = self._state(link.source), self._state(link.target)
        return target in ("up", "dead") and source != "cut"

    def check_integrity(self) -> None:
        """Nothing is left of any request."""
        while waiting := [link for link in self._network.waiting() if link.target != DRIVER]:
            message = self._network.take(waiting[0])
            self._network.post(waiting[0].target, self._workers[waiting[0].target - 1].on_message(message))
            for place, worker in enumerate(self._workers, start=1):
                self._network.post(place, itertools.chain.from_iterable(iter(worker.on_idle, None)))
        for worker in self._workers:
            worker.check_integrity()
            assert not worker.num_open, "a cache has leaked"

    def wake(self) -> None:
        """Nobody waits."""

    def end_session(self) -> None:
        """What is on its way is lost, and the workers' caches with it."""

    def close(self) -> None:
        self._launcher.close()
