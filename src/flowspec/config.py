"""The settings of the parts, one frozen dataclass per concern. The command line takes its defaults from here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from flowspec.checked import check_at_most, check_not_negative, check_positive, checked_class
from flowspec.core import MAX_ROWS, MAX_RUNNING
from flowspec.errors import FieldError, UsageError

LEAST_MEMORY = 256  # tokens
DEVICES_OF_A_TOKEN = 8  # that may join by it, unless whoever makes it says otherwise
CACHE_GB = 50.0  # of a device's disk, for weights that drivers send
MIN_HEARTBEAT_S, MAX_HEARTBEAT_S = 0.01, 60.0

MIN_HEARTBEAT_TIMEOUT_S = 0.3  # what a busy machine's sockets answer in
MAX_HEARTBEAT_TIMEOUT_S = 3 * MAX_HEARTBEAT_S
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


@checked_class
@dataclass(frozen=True)
class TreeConfig:
    """What a draft tree may look like (EAGLE-2, arXiv 2406.16858, and FlowSpec, arXiv 2507.02620)."""

    top_k: int = 10  # children drafted for a node
    width: int = 10  # nodes expanded in one draft pass
    depth: int = 6  # levels below the root that are drafted at once
    max_depth: int = 12  # levels below the root that deepening may reach while nothing was verified
    root_passes: int = 2  # draft passes that a root outside the tree waits for at most, to take its first guesses along
    refresh_passes: int = 1  # draft passes after a commit before the surviving tree is sent on, with fresher scores
    size: int = 80  # nodes of the tree that may be under way at once, the root included: the best by score
    min_probability: float = 0.02  # nodes that are reached less often, by the draft's own score, are not worth a row

    def __post_init__(self) -> None:
        check_positive(self, "top_k", "width", "depth", "size")
        check_at_most(self, "size", MAX_ROWS // 2)  # dead nodes leave the workers with a delay
        if not 0 <= self.min_probability < 1:
            raise UsageError(f"min_probability is {self.min_probability}; it must lie in [0, 1)")
        if self.max_depth < self.depth:
            raise UsageError(f"max_depth {self.max_depth} is below depth {self.depth}; raise it or lower the depth")

    @property
    def min_score(self) -> float:
        """``min_probability`` as a cumulative score."""
        return math.log(self.min_probability) if self.min_probability else -math.inf


PUBLISHED_TREE = TreeConfig(size=81, min_probability=0.0)  # 80 nodes and the root, in FlowSpec's and its baselines


@checked_class
@dataclass(frozen=True)
class LockstepConfig:
    """FlowSpec as published. EAGLE's code counts the passes after the first: its depth 5 is our depth 6."""

    tree: TreeConfig = PUBLISHED_TREE
    expand_depth: int = 6  # levels of the tree that is drafted after an acceptance
    expand_size: int = 64  # its nodes, the root excluded
    deepen: bool = False  # the tree grows deeper when a step has verified nothing; the paper was measured without
    deepen_size: int = 48  # nodes that this adds
    score_order: bool = True  # nodes enter by score; else level by level
    prune: bool = True  # dead nodes are dropped at every stage; else they stay until the round ends
    expand: bool = True  # the tree grows while it is in flight; else only between rounds
    segments: int = 0  # that the first tree is cut into; 0, and at most: one more than stages

    def __post_init__(self) -> None:
        check_positive(self, "expand_depth", "expand_size", "deepen_size")
        check_not_negative(self, "segments")

    @property
    def name(self) -> str:
        """``lockstep``, and which of its mechanisms are switched off."""
        switches = {"no-score-order": self.score_order, "no-prune": self.prune, "no-expand": self.expand}
        return "-".join(["lockstep", *(name for name, is_on in switches.items() if not is_on)])


@checked_class
@dataclass(frozen=True)
class FlowParts:
    """The parts of ``flow`` that can be switched off, to see what each is worth."""

    late_binding: bool = True  # a segment is composed when the pipeline is about to be free; else as soon as it may go
    segment_costs: bool = True  # segments are as long as the devices' costs allow; else as published
    steady: bool = True  # what a steady draft has guessed is not drafted again
    cancel: bool = True  # a forward whose rows have died stops between layers
    hints: bool = True  # workers tell early what they guess of rows under way
    ngrams: bool = True  # where the text repeats itself, what followed the last time joins the tree


@checked_class
@dataclass(frozen=True)
class PipelineConfig:
    """How a request is cut into segments."""

    segment_len: int = 0  # nodes in one segment of ``flow`` at most; 0: by the devices' costs, 16 where unknown
    segments_in_flight: int = 0  # segments under way at once at most; 0: one more than stages that run at once
    prefill_chunk: int = 256  # prompt tokens in one segment
    prefill_in_flight: int = 0  # such segments of one prompt under way at most; 0: one more than stages

    def __post_init__(self) -> None:
        check_positive(self, "prefill_chunk")
        check_at_most(self, "prefill_chunk", MAX_ROWS)
        if self.prefill_in_flight < 0:
            raise UsageError(f"prefill_in_flight is {self.prefill_in_flight}; it must be 0 (automatic) or positive")
        if self.segment_len < 0:
            raise UsageError(f"segment_len is {self.segment_len}; it must be 0 (automatic) or positive")
        if self.segments_in_flight < 0:
            raise UsageError(f"segments_in_flight is {self.segments_in_flight}; it must be 0 (automatic) or positive")


@checked_class
@dataclass(frozen=True)
class ScheduleConfig:
    """The settings of all schedules."""

    flow: TreeConfig = TreeConfig()  # of the schedule ``flow``
    flow_parts: FlowParts = FlowParts()
    lockstep: LockstepConfig = LockstepConfig()  # its tree is that of ``serial`` and ``chunked`` too
    pipedec_width: int = 16  # nodes of one tree level, and children drafted for each of them
    chunks: int = 0  # that ``chunked`` cuts its tree into; 0: one more than stages
    pipeline: PipelineConfig = PipelineConfig()

    def __post_init__(self) -> None:
        check_positive(self, "pipedec_width")
        check_not_negative(self, "chunks")


@checked_class
@dataclass(frozen=True)
class EngineConfig:
    """How many requests run at once, and in how much memory."""

    max_running: int = 16  # requests at once; the others wait
    kv_slots: int = 0  # tokens that the workers' KV caches hold for all requests together; 0: by their free memory
    kv_memory_share: float = 0.8  # of the memory that is free once the weights are loaded, for KV caches
    likely_tokens: int = 256  # of an answer that a request has room for when it starts; it takes more as it grows
    keeps_caches: bool = True  # a prompt that begins like an earlier request's text is not computed again so far
    memory_tokens: int = 2_000_000  # of the last 10,000 requests' texts, that guide guesses; 20 bytes each; 0: none

    def __post_init__(self) -> None:
        check_positive(self, "max_running", "likely_tokens")
        check_at_most(self, "max_running", MAX_RUNNING)
        if self.memory_tokens and self.memory_tokens < LEAST_MEMORY:
            problem = f"is {self.memory_tokens}; it must be 0 (none) or {LEAST_MEMORY} at least"
            raise FieldError("memory_tokens", problem)
        if self.kv_slots < 0:
            raise UsageError(f"kv_slots is {self.kv_slots}; it must be 0 (by the free memory) or positive")
        if not 0 < self.kv_memory_share <= 1:
            raise UsageError(f"kv_memory_share is {self.kv_memory_share}; it must lie in (0, 1]")


@checked_class
@dataclass(frozen=True)
class ServerConfig:
    """The HTTP server."""

    host: str = "127.0.0.1"  # 0.0.0.0 listens to the network
    port: int = 8000  # 0 lets the system choose
    api_key: str | None = None  # that every route but /health wants to see
    max_waiting: int = 64  # requests that may wait to be started; more are told to come back
    max_body_bytes: int = 4 * 2**20  # of one HTTP request
    stuck_after_s: float = 20.0  # /health turns bad when no stage has said anything of its work for this long
    spec_stats: bool = False  # every answer says how it came about
    cors_origins: tuple[str, ...] = ()  # of web pages that may use the server from a browser; "*": all pages

    def __post_init__(self) -> None:
        check_positive(self, "max_waiting", "max_body_bytes", "stuck_after_s")
        if not 0 <= self.port < 65536:
            raise UsageError(f"port is {self.port}; it must lie in 0..65535")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError("api_key is empty or has characters that HTTP headers cannot carry; use printable ASCII")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UsageError(f"cors origin {origin!r} is none; write it as https://example.com:8080, or * for all")


@checked_class
@dataclass(frozen=True)
class LinkConfig:
    """How long the processes wait for each other, and what travels between them."""

    start_timeout_s: float = 120.0  # a worker must be connected within this time, and say something of its loading
    stall_timeout_s: float = 120.0  # a run fails when no worker says anything for this long while work is under way
    heartbeat_timeout_s: float = 3.0  # a device that answers no heartbeat for this long is lost
    rejoin_timeout_s: float = 60.0  # requests wait this long for a lost device to come back; 0: not at all
    reassign_after_s: float = 30.0  # for so long, before its layers go to the others, if they fit; 0: they never do
    int8_wire: bool = False  # hidden states travel between workers in int8: fewer bytes, and not bit-exact
    insecure: bool = False  # without keys and encryption, to workers on other machines too

    def __post_init__(self) -> None:
        check_positive(self, "start_timeout_s", "stall_timeout_s", "heartbeat_timeout_s")
        check_not_negative(self, "rejoin_timeout_s", "reassign_after_s")
        if not MIN_HEARTBEAT_TIMEOUT_S <= self.heartbeat_timeout_s <= MAX_HEARTBEAT_TIMEOUT_S:
            raise FieldError(
                "heartbeat_timeout_s",
                f"is {self.heartbeat_timeout_s}; it must lie in {MIN_HEARTBEAT_TIMEOUT_S}..{MAX_HEARTBEAT_TIMEOUT_S}",
            )

    @property
    def heartbeat_s(self) -> float:
        """Between two signs of life: a third of the timeout, so that one may be late."""
        return self.heartbeat_timeout_s / 3
