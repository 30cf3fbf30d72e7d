"""The process around a worker: sockets, real time, sessions. One driver at a time, any number one after another.

``worker.serve`` runs one.
"""

from __future__ import annotations

import logging
import math
import re
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq
from msgspec.structs import replace

from flowspec.complaints import Complaints
from flowspec.core import interpolate
from flowspec.errors import DoesNotFitError, FlowspecError, ProtocolError, UsageError, described, shortened
from flowspec.model.loader import Checkpoint
from flowspec.model.received import stage_shapes
from flowspec.wire.actor import Route, Send
from flowspec.wire.messages import (
    LOADED,
    PROTOCOL_VERSION,
    Alive,
    Busy,
    Chunk,
    Configure,
    Echo,
    Failed,
    Failure,
    Loading,
    Manifest,
    Message,
    Probe,
    Ready,
    Stop,
    TapBlock,
)
from flowspec.wire.transport import Connection, Sender, session_of
from flowspec.worker.actor import Worker
from flowspec.worker.checks import check_configure
from flowspec.worker.door import Door, Keys
from flowspec.worker.fetch import StageFetch
from flowspec.worker.kept import Loaded, StageLoader
from flowspec.worker.measure import LinkMeter
from flowspec.worker.memory import Allowance, peak_memory_bytes
from flowspec.worker.session import Emulate, LinkLostError, Session, SessionOver, WorkerActor
from flowspec.worker.sources import Sources
from flowspec.worker.taps import TapBlocks

logger = logging.getLogger("flowspec.worker")

_LOADING_INTERVAL_S = 0.5
_ALMOST_LOADED = 0.99  # with all weights read: kernels are yet to be compiled, forwards to be measured
_LONGEST_WAIT_S = 0.5  # a signal that comes just before the wait does not end it
_MAX_READ = 64  # messages between two pieces of work: a flood of strangers' takes a share of the time, and not all
_SESSION_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


class WorkerProcess:
    """Serves sessions on one address until it is told to end."""

    def __init__(
        self,
        address: str,
        heartbeat_s: float,
        device: str = "cpu",
        emulate: Emulate | None = None,
        keys: Keys | None = None,
        sources: Sources | None = None,
        memory: Allowance | None = None,
    ) -> None:
        """``emulate``: of workers that play devices. ``sources``: of models. ``memory``: of the device.

        Raises ``UsageError`` when the address cannot be bound.
        """
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._door = Door(self._context, address, heartbeat_s, keys)
        except BaseException:
            self._context.term()
            raise
        self._listener = self._door.listener
        self._device = device
        self._loader = StageLoader(device, memory)
        self._sources = sources or Sources()
        self._emulate = emulate
        self._poller = zmq.Poller()
        self._poller.register(self._listener.socket, zmq.POLLIN)
        self._session: Session | None = None
        self._last_session = ""  # the name of the one before
        self._early: deque[tuple[Sender, list[Any]]] = deque()  # messages of our session that came while it was loading
        self._complaints = Complaints(logger)
        self._last_alive = self._last_told_s = 0.0

    @property
    def endpoint(self) -> str:
        return self._listener.endpoint

    def run(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Serve for ever. A session that fails is reported to its driver and ends; the process goes on."""
        while not is_over():
            try:
                self._step()
            except SessionOver as ended:
                logger.info("session ended: %s; waiting for a driver", ended)
                self._end_session()
            except Exception as error:  # the one broad catch: whatever it is, the driver must hear of it
                self._report(error)
                self._end_session()

    def close(self) -> None:
        self._end_session()
        self._door.close()
        self._context.term()

    def _step(self) -> None:
        """Read what has arrived, do one piece of work, and look whether the driver lives."""
        for _ in range(_MAX_READ):
            received = self._early.popleft() if self._early else self._listener.receive()
            if received is None:
                break
            self._handle(*received)
        session = self._session
        sends = session.worker.on_idle() if session is not None and session.worker is not None else None
        if sends is not None:
            self._dispatch(sends)
        self._check_peers()
        self._tend_link()
        if sends is None:
            wake_s = session.worker.wake_s if session is not None and session.worker is not None else math.inf
            wait_s = min(_LONGEST_WAIT_S, max(0.0, wake_s - time.monotonic()))
            self._poller.poll(int(wait_s * 1000))

    def _handle(self, sender: Sender, frames: list[Any]) -> None:
        session, identity = self._session, sender.identity
        if session is None or not session.owns(identity):
            self._handle_stranger(sender, frames)
            return
        match message := self._listener.decode(frames):
            case Configure():
                self._refuse_twice(identity, session)
            case Probe():
                self._listener.reply(identity, Echo(message.number, time.perf_counter()))
            case Stop():
                raise SessionOver("the driver has finished")
            case Manifest() | Chunk() if session.fetch is not None:
                self._fetch(session, session.fetch, message)
            case TapBlock() if session.blocks is not None:
                session.blocks.take(message)
                self._end_loading(session)
            case _ if session.worker is not None:
                session.worker.link_bytes += 0 if identity == session.driver else sum(len(f) for f in frames)
                self._dispatch(session.worker.on_message(message))
            case _:
                logger.debug("dropped a %s before the stage is loaded", type(message).__name__)

    def _handle_stranger(self, sender: Sender, frames: list[Any]) -> None:
        """Of another session than ours: it may ask to begin one, and nothing else."""
        identity, name = sender.identity, session_of(sender.identity)
        try:
            self._door.check_driver(sender)
            configure = self._listener.decode_configure(frames)
            if not _SESSION_NAME.fullmatch(name):
                raise ProtocolError("its session has no name")
        except ProtocolError as error:
            if name != self._last_session:  # what was under way when it ended is no wonder
                self._complaints.warn(f"dropped a message of {shortened(name, 40)!r}: {error}")
            return
        if self._session is None:
            self._begin(name, identity, configure)
        elif self._session.name == name:
            self._refuse_twice(identity, self._session)
        else:
            self._listener.reply(identity, Busy("another driver uses this worker; try again when it has ended"))

    def _refuse_twice(self, identity: bytes, session: Session) -> None:
        self._listener.reply(identity, Busy(f"it has stage {session.stage} already; give each worker once"))

    def _begin(self, name: str, driver: bytes, configure: Configure) -> None:
        """Load the stage, unless it is still there from the last session, and connect to the next worker.

        The driver is told that all is ready by ``_tend_link``.
        """
        self._session = session = Session(name, driver, configure.stage, configure.heartbeat_s)
        if configure.version != PROTOCOL_VERSION:
            raise UsageError(
                f"worker {configure.stage} speaks protocol {PROTOCOL_VERSION}, the driver {configure.version}; "
                "install the same flowspec version on both"
            )
        check_configure(configure, self.endpoint)
        if configure.emulation is not None and self._emulate is None:
            raise UsageError(f"worker {configure.stage} plays no device; flowspec emulate starts workers of its own")
        self._door.open_for(configure)
        self._tell_driver(Alive())  # the hub may have to be asked
        session.configure = configure
        if configure.next_address is not None:
            session.link = self._connect(name, configure.next_address, configure)
            session.meter = LinkMeter() if configure.emulation is None else None
        if (source := self._sources.find(configure.model)) is not None:
            self._load(session, configure, source)
        else:
            fits = self._loader.check_fits
            session.fetch = self._sources.fetch(configure, lambda stage: fits(configure, stage_shapes(stage)))
            self._tell_driver(session.fetch.begin())

    def _fetch(self, session: Session, fetch: StageFetch, message: Manifest | Chunk) -> None:
        """Take what the driver sends of the stage, until all has come that is not on the disk."""
        for want in fetch.take(message):
            self._tell_driver(want)
        if self._is_time_to_tell():
            self._tell_driver(fetch.progress())
        if fetch.is_complete:
            session.fetch, session.num_fetched = None, fetch.num_bytes
            assert session.configure is not None, "it has been asked for"
            configure = session.configure if fetch.has_hints else replace(session.configure, hints=None)
            self._load(session, configure, fetch.checkpoint())

    def _is_time_to_tell(self) -> bool:
        if is_time := time.monotonic() - self._last_told_s >= _LOADING_INTERVAL_S:
            self._last_told_s = time.monotonic()
        return is_time

    def _load(self, session: Session, configure: Configure, source: Checkpoint) -> None:
        self._tell_driver(Loading(0.0))
        session.loaded = loaded = self._loader.load(configure, source, self._tell_progress)
        session.blocks = None if configure.taps is None else TapBlocks(configure, configure.taps, loaded.stage)
        self._end_loading(session)

    def _connect(self, name: str, address: str, configure: Configure) -> Connection:
        keys = self._door.keys_to_next(configure)
        link = Connection(self._context, address, name, "data", configure.heartbeat_s, configure.int8_wire, keys=keys)
        for socket in link.sockets:
            self._poller.register(socket, zmq.POLLIN)
        return link

    def _tell_progress(self, done: float) -> None:
        """Now and then, and read meanwhile: what strangers send must not pile up."""
        if self._is_time_to_tell():
            self._tell_driver(Loading(min(done, _ALMOST_LOADED)))
        assert self._session is not None
        for _ in range(_MAX_READ * _MAX_READ):
            if (received := self._listener.receive()) is None:
                break
            if self._session.owns(received[0].identity):
                self._early.append(received)
            else:
                self._handle_stranger(*received)

    def _end_loading(self, session: Session) -> None:
        """As soon as it has all that its driver was to send."""
        configure, loaded, blocks = session.configure, session.loaded, session.blocks
        assert configure is not None and loaded is not None, "the stage is loaded"
        if blocks is not None and not blocks.is_complete:
            return
        session.worker = self._make_worker(configure, loaded, blocks)
        session.blocks = None
        session.ready = Ready(
            configure.stage,
            loaded.stage.weights_bytes,
            peak_memory_bytes(),
            forward_s=loaded.forward_s,
            slot_bytes=loaded.stage.slot_bytes,
            free_bytes=self._loader.memory.free_bytes,
            fingerprint=loaded.fingerprint,
            load_s=time.monotonic() - session.start_s,
            fetched_bytes=session.num_fetched,
        )
        self._tell_driver(Loading(LOADED))
        logger.info("layers %d:%d of %s are ready", configure.start_layer, configure.end_layer, configure.model)

    def _make_worker(self, configure: Configure, loaded: Loaded, blocks: TapBlocks | None) -> WorkerActor:
        index, taps = configure.stage, None if blocks is None else blocks.make_taps(configure, self._device)
        if configure.emulation is None:
            return Worker(
                loaded.stage,
                index,
                time.perf_counter,
                hinter=loaded.hinter,
                forward_s=lambda num_rows: interpolate(loaded.forward_s, num_rows),
                layers=f"{configure.start_layer}:{configure.end_layer}",
                limits=loaded.limits,
                taps=taps,
                guesser=loaded.guesser,
                num_best=configure.num_best,
            )
        assert self._emulate is not None, "checked before"
        return self._emulate(loaded.stage, index, configure.emulation, loaded.hinter, taps)

    def _tend_link(self) -> None:
        """Reach the next worker and measure the link; then tell the driver that all is ready.

        The next worker may start later than this one: the driver decides how long to wait for it.
        """
        session = self._session
        if session is None or (session.link is not None and not session.link.is_up):
            return
        meter, ready = session.meter, session.ready
        while session.link is not None and (arrived := session.link.receive()) is not None:
            if meter is not None and isinstance(arrived[0], Echo):  # else nobody waits for it any more
                meter.on_echo(arrived[0], time.monotonic())
        if ready is None:
            return
        if session.link is None or meter is None:
            self._tell_ready(session, ready)
        elif (probe := meter.next_probe(time.monotonic())) is not None:
            session.link.send(probe)
        elif meter.is_done:
            self._tell_ready(session, replace(ready, link_bytes_per_s=meter.bytes_per_s))

    def _tell_ready(self, session: Session, ready: Ready) -> None:
        logger.debug("measured %s", ready)
        session.ready = session.meter = None
        self._tell_driver(ready)

    def _dispatch(self, sends: list[Send]) -> None:
        assert self._session is not None
        for send in sends:
            match send.route:
                case Route.NEXT:
                    assert self._session.link is not None
                    self._session.link.send(send.message)
                case Route.DRIVER:
                    self._tell_driver(send.message)
                case Route.WORKERS:
                    raise AssertionError("only the driver speaks to all workers")

    def _tell_driver(self, message: Message) -> None:
        assert self._session is not None
        if isinstance(message, Failed):
            self._complaints.warn(f"request {message.request_id} failed: {message.text}")
        self._last_alive = time.monotonic()
        if not self._listener.reply(self._session.driver, message):
            raise SessionOver("the driver is gone")

    def _check_peers(self) -> None:
        """A silent driver is asked for a sign of life now and then; a lost link ends the session."""
        session = self._session
        if session is None:
            return
        if session.link is not None:
            session.link.check()
            if session.link.is_lost:
                next_worker = f"worker {session.stage + 1} ({session.link.address})"
                raise LinkLostError(f"lost the connection to {next_worker}; has it ended?")
        if time.monotonic() - self._last_alive >= session.heartbeat_s:
            self._tell_driver(Alive())

    def _report(self, error: Exception) -> None:
        text = described(error)
        self._complaints.warn(f"session failed: {text}")
        logger.debug("", exc_info=error)
        if self._session is not None:
            kinds = UsageError, LinkLostError, DoesNotFitError
            failure = Failure(text, traceback.format_exc(), *(isinstance(error, kind) for kind in kinds))
            self._listener.reply(self._session.driver, failure)
        if not isinstance(error, FlowspecError):
            self._loader.forget()

    def _end_session(self) -> None:
        """May be called again where a signal has interrupted it."""
        if self._session is not None and self._session.link is not None:
            for socket in self._session.link.sockets:
                if socket in self._poller:
                    self._poller.unregister(socket)
            self._session.link.close()
        if self._session is not None and self._session.fetch is not None:
            self._session.fetch.close()
        self._door.shut()
        self._early.clear()
        self._last_session = "" if self._session is None else self._session.name
        self._session = None
