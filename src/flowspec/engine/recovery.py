"""How a lost pipeline comes back: who is away, when to try again, when to give up. Knows no requests.

A worker that has ended is started again where it was started here, and awaited where somebody else has started it.
Then a new session begins with all of them, in which those that have lived on need not load anything. Where one stays
away, its layers go to the others.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, cast

from flowspec.cluster.bring_up import BringUp
from flowspec.cluster.connections import Connections, LoadProgress
from flowspec.cluster.launcher import Launcher, RunningWorkers
from flowspec.engine.pipeline import Pipeline, PipelineSpec, connect
from flowspec.engine.reassign import without
from flowspec.engine.telemetry import StageState
from flowspec.errors import BusyError, WorkerEndedError, WorkerError
from flowspec.wire.messages import Ready

logger = logging.getLogger("flowspec.engine")

MAX_LOSSES = 3  # of one worker, with no token between them
STEADY_S = 30.0  # a pipeline that was whole for so long is no part of a crash loop
_PIECE_S = 0.1  # of waiting at a time: whoever owns the engine has other work too
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.1, 2.0
_CONNECT_S, _ANSWER_S = 5.0, 10.0  # in which a worker of this machine is connected, and answers, or is replaced


class Session(Connections, Protocol):
    """An attempt at a new session, as ``RemoteConnections`` are; see there."""

    bring_up: BringUp

    def poll_ready(self, progress: LoadProgress, timeout_s: float) -> list[Ready] | None: ...

    def check_silent(self, silent: Sequence[int]) -> None: ...

    def is_up(self, stage: int) -> bool: ...

    def end_session(self) -> None: ...


Connect: TypeAlias = Callable[[PipelineSpec, Launcher], Session]


class Recovery:
    """Of one engine's pipeline. ``begin``, then ``step`` until it returns the pipeline that takes the lost one's place.

    All but ``problem``, ``state_of`` and ``num_recoveries`` belongs to the engine's thread.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        connect: Connect = connect,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``connect``: begins a new session; ``clock`` and ``sleep``: other than the real ones in simulations."""
        self._connect_to, self._clock, self._sleep = connect, clock, sleep
        self.num_recoveries = 0
        self.problem: str | None = None  # why requests wait, in words; ``None``: nothing is lost
        self._pipeline = pipeline  # the newest that was whole
        self._config = pipeline.spec.link
        self._connections: Session | None = None  # of the attempt under way
        self._whole_since_s = self._clock()
        self._losses: Counter[int] = Counter()  # by stage, since the last token
        self._error = WorkerError("nothing was lost")  # the newest reason
        self._lost_s = 0.0  # when the pipeline was lost
        self._blamed: set[int] = set()  # stages by which it was lost, as far as they have not come back
        self._away_s: dict[int, float] = {}  # since when, by stages that have not answered
        self._needed: list[int] = []  # stages that are away for too long, and that the others have no room for
        self._to_replace: set[int] = set()  # stages whose workers, if they are ours, do not answer
        self._num_attempts = 0
        self._next_s = 0.0  # when the next attempt begins
        self._attempt_s = 0.0  # when the newest one began

    @property
    def is_under_way(self) -> bool:
        return self.problem is not None

    def note_progress(self) -> None:
        """A token has come: whatever was lost before is no crash loop."""
        self._losses.clear()

    def state_of(self, stage: int) -> StageState:
        """Of a stage's worker. Any thread may ask."""
        if self.problem is None:
            return "up"
        return "away" if stage in self._away_s else "loading"

    def begin(self, error: WorkerError) -> None:
        """The pipeline is lost. Raises ``WorkerError`` when there is no way back."""
        if self._pipeline.launcher is None or not self._config.rejoin_timeout_s:
            raise error
        now = self._clock()
        if now - self._whole_since_s > STEADY_S:
            self._losses.clear()
        self._lost_s = self._next_s = now
        self._num_attempts = 0
        self._away_s, self._blamed, self._to_replace, self._needed = {}, set(), set(), []
        logger.warning("%s; requests wait until it is back", error)
        cast("Session", self._pipeline.connections).end_session()  # it has a launcher
        self._note_loss(error, now)

    def step(self, max_wait_s: float) -> Pipeline | None:
        """Go on for at most so long; ``None``: not there yet. Raises ``WorkerError`` when it gives up."""
        assert self.is_under_way and self._pipeline.launcher is not None, "begin first"
        now = self._clock()
        self._reassign(now)
        self._check_away(now)
        wait_s = min(max_wait_s, _PIECE_S)
        if self._connections is None and now < self._next_s:
            self._sleep(min(wait_s, self._next_s - now))
            return None
        try:
            connections = self._connections or self._connect(now)
            ready = connections.poll_ready(lambda done: None, wait_s)
            self._note_answers(connections)
            if ready is None:
                self._check_silent(connections)
                return None
        except WorkerError as error:
            self._end_attempt(error)
            return None
        pipeline = Pipeline(self._pipeline.spec, connections, self._pipeline.launcher)
        pipeline.use(ready)
        self._pipeline, self._connections = pipeline, None
        self.num_recoveries += 1
        self._whole_since_s = self._clock()
        logger.warning("all workers are back after %.1f s", self._whole_since_s - self._lost_s)
        self.problem = None
        return pipeline

    def close(self) -> None:
        """Give the attempt under way up; the pipeline's owner closes its launcher."""
        if self._connections is not None:
            self._connections.end_session()
            self._connections = None

    def _connect(self, now: float) -> Session:
        launcher = self._pipeline.launcher
        assert launcher is not None, "begin has looked"
        self._attempt_s = now
        for stage in self._stages:
            self._away_s.setdefault(stage, now)  # until it answers
        launcher.replace(sorted(self._to_replace))
        self._to_replace.clear()
        self._connections = self._connect_to(self._pipeline.spec, launcher)
        return self._connections

    def _end_attempt(self, error: WorkerError) -> None:
        logger.debug("attempt %d: %s", self._num_attempts, error)
        self.close()
        now = self._clock()
        self._next_s = now + min(_FIRST_BACK_OFF_S * 2**self._num_attempts, _LONGEST_BACK_OFF_S)
        self._num_attempts += 1
        self._note_loss(error, now)

    def _note_loss(self, error: WorkerError, now: float) -> None:
        """Raises ``WorkerError`` when a worker is lost again and again."""
        self._error = error
        lost = list(error.stages) or self._stages  # nobody knows whose fault it is
        for stage in lost:
            self._away_s.setdefault(stage, now)
        if not isinstance(error, BusyError):
            self._blamed.update(lost)
            self._losses.update(lost)
            if not isinstance(error, WorkerEndedError):
                self._to_replace.update(lost)
        self._tell(now)
        often = [stage for stage in lost if self._losses[stage] >= MAX_LOSSES]
        if often:
            raise WorkerError(
                f"{self._named(often)} was lost {MAX_LOSSES} times, and no token came in between; the last time: "
                f"{error}; see what its log or the system's says",
                often,
            )

    def _note_answers(self, connections: Session) -> None:
        for stage in connections.bring_up.heard & self._away_s.keys():
            del self._away_s[stage]
            self._blamed.discard(stage)
        self._tell(self._clock())

    def _check_silent(self, connections: Session) -> None:
        """Raises ``WorkerError`` for a worker that must be replaced, or hangs while it loads."""
        now, heard = self._clock(), connections.bring_up.heard
        if mute := [stage for stage in self._stages if stage not in heard and self._is_mute(stage, connections, now)]:
            raise WorkerError(f"{self._named(mute)} does not answer", mute)
        silent = connections.bring_up.silent_since(now - self._config.start_timeout_s)
        connections.check_silent([stage for stage in silent if stage in heard])

    def _is_mute(self, stage: int, connections: Session, now: float) -> bool:
        """Whether its worker is a process of ours that has had the time to answer; others may be away for longer."""
        assert self._pipeline.launcher is not None, "begin has looked"
        age_s = self._pipeline.launcher.age_s(stage)
        allowed_s = _ANSWER_S if connections.is_up(stage) else max(_CONNECT_S, self._config.heartbeat_timeout_s)
        return age_s is not None and min(age_s, now - self._attempt_s) > allowed_s

    def _check_away(self, now: float) -> None:
        """Raises ``WorkerError`` when a worker is away for too long."""
        gone = [stage for stage, since_s in self._away_s.items() if now - since_s > self._config.rejoin_timeout_s]
        if gone:
            raise WorkerError(
                f"{self._named(gone)} was away for {self._config.rejoin_timeout_s:.0f} s: {self._error}; start it "
                "again, and then this",
                gone,
            )

    def _reassign(self, now: float) -> None:
        """Go on without devices that have been away for too long, where the others have room for their layers."""
        after_s = self._config.reassign_after_s
        gone = [stage for stage, since_s in self._away_s.items() if after_s and now - since_s > after_s]
        if gone == self._needed or not isinstance(self._pipeline.launcher, RunningWorkers):
            return
        names, before = self._named(gone), self._pipeline
        if (spec := without(before.spec, before.ready, gone)) is None:
            logger.warning("%s is away for %.0f s, and the others have no room for its layers", names, after_s)
            self._needed = gone
            return
        logger.warning("%s is away for %.0f s; its layers go to the others: %s", names, after_s, spec.partition)
        self.close()
        assert spec.workers is not None, "they run elsewhere"
        launcher = RunningWorkers(spec.workers, self._pipeline.launcher.security)
        self._pipeline = Pipeline(spec, before.connections, launcher)
        self._pipeline.ready = [one for stage, one in enumerate(before.ready, start=1) if stage not in gone]
        self._away_s, self._blamed, self._to_replace, self._needed = {}, set(), set(), []
        self._losses.clear()
        self._num_attempts, self._next_s = 0, now

    def _tell(self, now: float) -> None:
        """Write ``problem`` anew."""
        missing = sorted(self._blamed & self._away_s.keys()) or sorted(self._away_s)
        if missing:
            since_s = min(self._away_s[stage] for stage in missing)
            self.problem = f"{self._named(missing)} is away for {now - since_s:.0f} s; requests wait until it is back"
        else:
            self.problem = "all workers are back, and load their layers; requests wait"

    @property
    def _stages(self) -> list[int]:
        return list(range(1, len(self._pipeline.partition) + 1))

    def _named(self, stages: list[int]) -> str:
        return " and ".join(self._pipeline.spec.name_of(stage) for stage in stages)
