"""A model over its workers, for any number of requests at once. Single-threaded: whoever owns it calls ``step``.

It brings up the workers and the driver, moves the messages between them, and keeps requests waiting until their keys
and values fit into the workers' memory. It knows tokens; ``llm`` and ``server`` know texts.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from flowspec.chat_template import ChatTemplate
from flowspec.cluster.launch import (
    Cluster,
    InprocCluster,
    LocalProcesses,
    RemoteCluster,
    Trip,
    local_threads,
    num_cores,
)
from flowspec.config import EngineConfig, LinkConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import DraftDType, DType, Partition, SamplingParams, TokenLogprobs
from flowspec.draft.base import DraftSource
from flowspec.draft.catalogue import ChosenDraft, choose_draft, load_draft
from flowspec.driver import Driver
from flowspec.errors import FlowspecError, RequestError, UsageError, WorkerError
from flowspec.model.loader import DEMO, Checkpoint, check_device, draft_place
from flowspec.model.target_head import TargetHead
from flowspec.request.generation import Generation, Request
from flowspec.request.meter import Meter
from flowspec.schedule.auto import Experience
from flowspec.schedule.base import Schedule
from flowspec.schedule.catalogue import AUTO, make_schedule
from flowspec.schedule.pace import MeasuredCosts, Pace
from flowspec.text import Vocabulary
from flowspec.wire.messages import Alive, Failed, Ready, Result, Send

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("flowspec.engine")

DEFAULT_STAGES = 4
_LONGEST_WAIT_S = 0.5

Progress = Callable[[str, float], None]  # what is being done, and the share that is done
ResultHook = Callable[[Generation, Result], None]


@dataclass
class Job:
    """One request, from its submission to its end."""

    request: Request
    schedule: str
    stopwatch: Stopwatch
    is_chat: bool = False
    generation: Generation | None = None  # ``None`` until it is started; the one before while it waits to go on
    is_cancelled: bool = False
    error: FlowspecError | None = None  # what ended it
    prepared: Schedule | None = None  # while it waits to be started

    @property
    def output_ids(self) -> list[int]:
        return self.generation.output_ids if self.generation is not None else []

    @property
    def output_logprobs(self) -> list[TokenLogprobs]:
        return self.generation.output_logprobs if self.generation is not None else []

    @property
    def is_finished(self) -> bool:
        has_ended = self.generation is not None and self.generation.finish_reason is not None
        return self.is_cancelled or self.error is not None or has_ended


@dataclass
class Stopwatch:
    """When tokens came out; docs/METHODOLOGY.md defines the two figures."""

    start_s: float = field(default_factory=time.perf_counter)
    first: tuple[float, int] | None = None  # time and number of tokens of the first emission
    last: tuple[float, int] = (0.0, 0)

    def note(self, num_tokens: int) -> None:
        """So many tokens are out now."""
        if num_tokens > self.last[1]:
            self.last = (time.perf_counter(), num_tokens)
            self.first = self.first or self.last

    @property
    def ttft_ms(self) -> float:
        assert self.first is not None, "no token has come out"
        return (self.first[0] - self.start_s) * 1000

    @property
    def tokens_per_s(self) -> float:
        """Of the whole run when all tokens came at once."""
        assert self.first is not None, "no token has come out"
        since_s, num_before = self.first if self.first != self.last else (self.start_s, 0)
        return (self.last[1] - num_before) / (self.last[0] - since_s)


class Engine:
    """One model, cut over workers. A context manager; ``close`` ends the workers it started.

    Args:
        model: a directory, a hub name, or ``"demo"``.
        draft: ``"auto"`` (the head that belongs to the model, else n-grams), ``"none"``, ``"ngram"``, the directory of
            an EAGLE head, or a draft source of your own.
        draft_dtype: ``"int8"`` quantises the weights of a draft head, which are then read faster; guesses may get
            slightly worse, the text stays the same. ``"auto"`` is ``dtype``.
        stages: how many stages; the layers are shared out evenly.
        partition: the stages' layer ranges instead, ``"0:4,4:8"``.
        workers: addresses of running workers in pipeline order, instead of starting some here.
        hints: workers tell the driver early what they guess, where the draft has hint heads; by default where they
            do not share this machine's cores.
        in_process: run the workers in this process, one after the other; slow, for tests and debugging.
        meter: is told of the driver's work.

    Raises ``UsageError`` for what the caller can mend, ``WorkerError`` when a worker fails.
    """

    def __init__(
        self,
        model: str | Path = DEMO,
        *,
        draft: str | Path | DraftSource = "auto",
        draft_dtype: DraftDType = "auto",
        stages: int | None = None,
        partition: str | Partition | None = None,
        workers: Sequence[str] | None = None,
        schedule: str = AUTO,
        dtype: DType = "float32",
        device: str = "cpu",
        tree: TreeConfig | None = None,
        pipeline: PipelineConfig | None = None,
        link: LinkConfig | None = None,
        config: EngineConfig | None = None,
        hints: bool | None = None,
        in_process: bool = False,
        progress: Progress | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._tree = tree or TreeConfig()
        self._pipeline = pipeline or PipelineConfig()
        self._schedules = ScheduleConfig(flow=self._tree, pipeline=self._pipeline)
        self._link = link or LinkConfig()
        self.config = config or EngineConfig()
        self.progress = progress or (lambda what, done: None)
        self._meter = meter
        self._dtype: DType = dtype
        self._draft_dtype: DraftDType = draft_dtype
        self._device = device
        self._next_request_id = 0
        self._cluster: Cluster | None = None
        self._in_use = threading.RLock()  # whoever holds it may touch the connections
        self._close_wanted = False
        self._bytes_at_close = 0
        self.source: DraftSource | None = None
        self._experience = Experience()
        self._tree_sizes: dict[str, int] = {}  # by schedule
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by request id
        self._has_worked = True
        self._last_news = time.monotonic()
        self.result_hook: ResultHook | None = None  # is told of each result before the driver is
        self.busy_s: dict[int, float] = {}  # of forwards whose results came back, by stage
        self._busy_since: dict[int, float] = {}  # start of the newest forward that was counted, by stage
        self._last_probe = 0.0
        self.ready: list[Ready] = []  # what each worker said of its stage; empty in process
        self.stage_bytes: dict[int, int] = {}  # received by each worker on the data path, by stage
        if workers is not None and (in_process or not workers):
            raise UsageError("workers: name at least one address, and do not ask for in_process too")
        if in_process and self._link.int8_wire:
            raise UsageError("int8_wire: there is no wire in one process; leave in_process or int8_wire out")
        check_device(device)
        self.schedule_name = schedule
        self._costs: MeasuredCosts | None = None
        self._pace: Pace | None = None
        self.checkpoint = Checkpoint.open(model)
        self.sampling_defaults = self.checkpoint.sampling_defaults  # bad ones are an error before anything starts
        self.partition = _choose_partition(self.checkpoint, stages, partition, workers)
        # Workers elsewhere have cores of their own; here they share what the driver leaves them.
        self._num_parallel = len(self.partition) if workers else min(len(self.partition), max(1, num_cores() - 1))
        chosen_draft = choose_draft(self.checkpoint, draft, draft_dtype)  # before any process is started
        self._make_schedule(schedule)
        if hints is None:
            hints = self._num_parallel == len(self.partition)
        place = draft_place(chosen_draft) if hints and isinstance(chosen_draft, Path) else None
        self.addresses: list[str] = []  # of the workers; none in process
        if in_process:
            self._cluster = InprocCluster(self.checkpoint, self.partition, dtype, device, place)
        else:
            self._cluster = self._connect(workers, place)
        try:
            self.tokenizer: PreTrainedTokenizerBase = self.checkpoint.load_tokenizer()
            self.vocabulary = Vocabulary(self.tokenizer)
            self.chat_template = ChatTemplate(self.tokenizer, self.checkpoint.title)
            self._turn_end_ids = self._find_turn_ends()
            head, self.source = self._load_draft(chosen_draft)
            if isinstance(self._cluster, RemoteCluster):
                self.ready = self._cluster.await_ready(lambda done: self.progress("loading", done))
                # Workers that share cores, or one accelerator, measure at the same time, and so nothing of use.
                if workers or (torch.device(device).type == "cpu" and num_cores() > len(self.partition)):
                    item_bytes = 1 if self._link.int8_wire else getattr(torch, dtype).itemsize
                    self._costs = MeasuredCosts(self.ready, self.checkpoint.hidden_size * item_bytes)
                    self._pace = Pace(self._costs)
            self._driver = Driver(
                head,
                self.source,
                self._pipeline,
                self.checkpoint.max_positions,
                time.perf_counter,
                meter,
                self._num_slots(are_local=workers is None),
                self.config.keeps_caches,
                self.config.likely_tokens,
                len(self.partition),
            )
        except BaseException:
            self.close()
            raise

    def _connect(self, workers: Sequence[str] | None, hints: str | None) -> RemoteCluster:
        """Start loading at the workers; what the driver itself loads is loaded meanwhile."""
        processes = None
        if workers is None:
            threads = local_threads(len(self.partition))
            processes = LocalProcesses(len(self.partition), threads, self._device)
            torch.set_num_threads(threads)  # the driver shares the cores with its workers
            workers = processes.addresses
        self.addresses = list(workers)
        cluster = RemoteCluster(workers, self._link, processes)
        try:
            cluster.configure(self.checkpoint.full_name, self.partition, self._dtype, hints=hints)
        except BaseException:
            cluster.close()
            raise
        return cluster

    def _load_draft(self, draft: ChosenDraft) -> tuple[TargetHead, DraftSource | None]:
        head = TargetHead(self.checkpoint.load_lm_head(self._dtype, self._device))
        top_k = self._tree.top_k
        return head, load_draft(
            draft, self.checkpoint, head, top_k, self._dtype, self._device, draft_dtype=self._draft_dtype
        )

    def _find_turn_ends(self) -> frozenset[int]:
        """Tokens that end an answer: configs, tokenizer and template of a fine-tune often say different ones."""
        own = self.tokenizer.eos_token_id
        ids = self.checkpoint.all_eos_token_ids | self.chat_template.end_ids
        return ids | ({own} if isinstance(own, int) else frozenset())

    def _num_slots(self, are_local: bool) -> int | None:
        """Rows that every worker's caches have room for; local workers share the machine's memory."""
        if self.config.kv_slots:
            return self.config.kv_slots
        share = self.config.kv_memory_share / (len(self.partition) if are_local else 1)
        known = [ready for ready in self.ready if ready.free_bytes and ready.slot_bytes]
        return min((int(share * ready.free_bytes / ready.slot_bytes) for ready in known), default=None)

    def _make_schedule(self, name: str) -> Schedule:
        steady_steps = 1 if self.source is None else self.source.steady_steps
        return make_schedule(
            name, self._schedules, len(self.partition), self._num_parallel, self._pace, steady_steps, self._experience
        )

    def _tree_size(self, name: str) -> int:
        """As it was when the first such request came."""
        if name not in self._tree_sizes:
            self._tree_sizes[name] = self._make_schedule(name).tree.size
        return self._tree_sizes[name]

    # --- requests ---

    @property
    def served_defaults(self) -> dict[str, Any]:
        """Of a server's requests, and of a chat here, so that both give the same answers: OpenAI's, and the model's."""
        return {"temperature": 1.0, **self.sampling_defaults}

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, schedule: str | None = None) -> None:
        """Raises ``UsageError`` for what cannot be run. Looks at nothing that changes: any thread may call it."""
        if not prompt_ids:
            raise UsageError("the prompt is empty; give at least one token to continue")
        if not all(0 <= token_id < self.checkpoint.vocab_size for token_id in prompt_ids):
            raise UsageError(f"the prompt has token ids outside the vocabulary of {self.checkpoint.vocab_size}")
        if len(prompt_ids) >= self.checkpoint.max_positions:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens, but {self.checkpoint.name} has room for "
                f"{self.checkpoint.max_positions}, its answer included; shorten the prompt"
            )
        tree_size = self._tree_size(schedule or self.schedule_name)
        num_needed = self._driver.num_slots(len(prompt_ids), params.max_tokens, tree_size)
        num_slots = self.num_slots
        if num_slots is not None and num_needed > num_slots:
            raise UsageError(
                f"the prompt's {len(prompt_ids)} tokens and {params.max_tokens} more need {num_needed} places in the "
                f"workers' KV caches, with those of the draft tree, and there are {num_slots}; ask for fewer tokens"
            )

    def room(self, num_prompt: int) -> int:
        """Tokens that can be generated behind so long a prompt; 0 or less for one that is too long."""
        room = self.checkpoint.max_positions - num_prompt
        if self.num_slots is None:
            return room
        return min(room, self.num_slots - self._driver.num_slots(num_prompt, 0, self._tree_size(self.schedule_name)))

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, schedule: str | None = None, is_chat: bool = False
    ) -> Job:
        """Queue a request; ``step`` starts it. Raises ``UsageError`` as ``check`` does, or for an unknown schedule.

        ``is_chat``: whatever ends a turn ends it, and not only what ends a text.
        """
        if self._cluster is None:
            raise UsageError("this model is closed; make a new one")
        name = schedule or self.schedule_name
        self.check(prompt_ids, params, name)
        if params.temperature > 0 and params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        end_ids = self._turn_end_ids if is_chat else self.checkpoint.eos_token_ids
        request = Request(self._next_request_id, tuple(prompt_ids), params, end_ids)
        self._next_request_id += 1
        job = Job(request, name, Stopwatch(), is_chat)
        self._waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Give a request up; what is in flight dies where it is. One that has finished stays as it is."""
        if job.is_finished:
            return
        job.is_cancelled = True
        if self._running.pop(job.request.request_id, None) is None:
            self._waiting.remove(job)
        elif self._cluster is not None and job.generation is not None:
            self._cluster.send(self._driver.cancel(job.generation))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_slots(self) -> int | None:
        """Places in the workers' KV caches; ``None``: unknown."""
        return self._driver.budget.num_slots

    @property
    def num_slots_held(self) -> int:
        """By running requests."""
        return self._driver.budget.num_held

    @property
    def stalled_s(self) -> float:
        """For how long no worker has said anything of the work that is under way."""
        return time.monotonic() - self._last_news if self._running else 0.0

    # --- running ---

    def step(self, max_wait_s: float = _LONGEST_WAIT_S) -> list[Job]:
        """Do what there is to do, or wait up to ``max_wait_s``; returns the jobs that have more tokens, or have ended.

        Raises ``WorkerError`` when a worker fails: the engine is closed then.
        """
        try:
            with self._in_use:
                if self._cluster is None:
                    raise UsageError("this model is closed; make a new one")
                return self._step(self._cluster, max_wait_s)
        except FlowspecError:
            self.close()  # a pipeline with a hole is of no more use
            raise
        finally:
            if self._close_wanted:
                self.close()

    def _step(self, cluster: Cluster, max_wait_s: float) -> list[Job]:
        self._start_waiting(cluster)
        before = {request_id: len(job.output_ids) for request_id, job in self._running.items()}
        wait_s = 0.0 if self._has_worked else max(0.0, min(max_wait_s, self._driver.wake_s - time.perf_counter()))
        for message in cluster.receive(wait_s):
            match message:
                case Result():
                    self._note_result(message)
                case Failed():
                    logger.warning("worker %d, request %d: %s", message.stage, message.request_id, message.text)
                    logger.debug("%s", message.traceback)
                case _:
                    pass
            cluster.send(self._driver.on_message(message))
            if not isinstance(message, Alive):
                self._last_news = time.monotonic()
        if time.monotonic() - self._last_probe > self._link.heartbeat_s and isinstance(cluster, RemoteCluster):
            self._last_probe = time.monotonic()
            cluster.probe()
        sends = self._driver.on_idle()
        self._has_worked = sends is not None
        cluster.send(sends or [])
        if self.stalled_s > self._link.stall_timeout_s:
            raise WorkerError(
                f"the pipeline has returned nothing for {self._link.stall_timeout_s:.0f} s; a worker hangs"
            )
        return self._news(before)

    def _start_waiting(self, cluster: Cluster) -> None:
        """First come, first served: what does not fit yet is not overtaken."""
        while self._waiting and len(self._running) < self.config.max_running:
            job, sends = self._waiting[0], list[Send]()
            try:
                job.prepared = job.prepared or self._prepare(job.schedule)
                if not self._driver.has_room(job.request, job.prepared, len(job.output_ids)):
                    return
                job.generation, sends = self._driver.submit(job.request, job.prepared, job.generation)
            except Exception as error:
                job.error = _told(error, job)
            job.prepared = None
            self._waiting.popleft()
            if not self._running:
                self._last_news = time.monotonic()
            self._running[job.request.request_id] = job
            self._has_worked = True
            cluster.send(sends)

    def _prepare(self, schedule: str) -> Schedule:
        """For one job, by what segments cost now."""
        if self._pace is not None:
            self._pace.measure()
        return self._make_schedule(schedule)

    def _note_result(self, result: Result) -> None:
        if self._costs is not None:
            self._costs.note(result.timings)
        for timing in result.timings:
            self.stage_bytes[timing.stage] = timing.link_bytes
            if timing.start_s > self._busy_since.get(timing.stage, 0.0):  # requests that shared a forward count once
                self._busy_since[timing.stage] = timing.start_s
                busy_s = self.busy_s.get(timing.stage, 0.0)
                self.busy_s[timing.stage] = busy_s + timing.end_s - timing.start_s
        job = self._running.get(result.request_id)
        if self.result_hook is not None and job is not None and job.generation is not None:
            try:
                self.result_hook(job.generation, result)
            except Exception:
                logger.exception("who is told of results met a bug, and is told no more")
                self.result_hook = None

    def _news(self, before: dict[int, int]) -> list[Job]:
        news: list[Job] = []
        for request_id, job in list(self._running.items()):
            if job.error is None and job.generation is not None and job.generation.error is not None:
                job.error = _told(job.generation.error, job)
            if job.is_finished or len(job.output_ids) > before[request_id]:
                job.stopwatch.note(len(job.output_ids))
                news.append(job)
            is_preempted = job.generation is not None and job.generation.is_preempted
            if job.is_finished or is_preempted:
                del self._running[request_id]
            if is_preempted and not job.is_finished:
                logger.debug("request %d gives its caches up and waits", request_id)
                self._wait_again(job)
        return news

    def _wait_again(self, job: Job) -> None:
        """In the order in which the requests came."""
        place = sum(waiting.request.request_id < job.request.request_id for waiting in self._waiting)
        self._waiting.insert(place, job)

    @property
    def link_bytes(self) -> int:
        """Bytes on all links so far; the driver counts its own, the first hop included, workers the hops between."""
        own_bytes = self._cluster.link_bytes if self._cluster is not None else self._bytes_at_close
        return own_bytes + sum(b for stage, b in self.stage_bytes.items() if stage > 1)

    @property
    def trips(self) -> Mapping[int, Trip]:
        """The newest known round trip to each worker, by stage. Any thread may ask."""
        cluster = self._cluster
        return cluster.trips if cluster is not None else {}

    def wake(self) -> None:
        """Let a ``step`` that waits return. Any thread may call it."""
        if self._cluster is not None:
            self._cluster.wake()

    # --- ending ---

    @property
    def is_closed(self) -> bool:
        return self._cluster is None

    def close(self) -> None:
        """End the workers that were started here; others go back to waiting. Safe to call twice.

        While another thread is inside ``step``, which alone may touch the connections, they close at its end.
        """
        self._close_wanted = True
        if not self._in_use.acquire(blocking=False):
            self.wake()
            return
        try:
            cluster, self._cluster = self._cluster, None
            if cluster is not None:
                self._bytes_at_close = cluster.link_bytes
                cluster.close()
        finally:
            self._in_use.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _told(error: Exception, job: Job) -> FlowspecError:
    """What a caller is told of the error that ended a job; the log has all of it."""
    level = logging.DEBUG if isinstance(error, FlowspecError) else logging.ERROR
    logger.log(level, "request %d met an error", job.request.request_id, exc_info=error)
    return RequestError.of(error)


def _choose_partition(
    checkpoint: Checkpoint, stages: int | None, partition: str | Partition | None, workers: Sequence[str] | None
) -> Partition:
    if partition is not None:
        chosen = Partition.parse(partition) if isinstance(partition, str) else partition
        chosen.check_fits(checkpoint.num_layers)
    else:
        default = len(workers) if workers is not None else min(DEFAULT_STAGES, checkpoint.num_layers)
        chosen = Partition.even(checkpoint.num_layers, default if stages is None else stages)
    if stages is not None and len(chosen) != stages:
        raise UsageError(f"{stages} stages, but the partition {chosen} has {len(chosen)}; give one of the two")
    if workers is not None and len(chosen) != len(workers):
        raise UsageError(f"{len(workers)} workers for {len(chosen)} stages; give one address for each stage")
    return chosen
