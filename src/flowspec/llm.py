"""The offline Python API: a model over several workers, text in, text out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream

from flowspec.config import LinkConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import DraftDType, DType, FinishReason, Partition, SamplingParams
from flowspec.draft.base import DraftSource
from flowspec.draft.catalogue import ChosenDraft, choose_draft, load_draft
from flowspec.driver import Driver
from flowspec.errors import FlowspecError, UsageError, WorkerError
from flowspec.generation import Generation, Request, Stats
from flowspec.launch import Cluster, InprocCluster, LocalProcesses, RemoteCluster, local_threads, num_cores
from flowspec.messages import Alive, Ready, Result
from flowspec.model.loader import DEMO, Checkpoint, check_device, draft_place
from flowspec.model.target_head import TargetHead
from flowspec.schedule.auto import Experience
from flowspec.schedule.base import Schedule
from flowspec.schedule.catalogue import AUTO, make_schedule
from flowspec.schedule.pace import MeasuredCosts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_STAGES = 4

Progress = Callable[[str, float], None]  # what is being done, and the share that is done


@dataclass(frozen=True)
class RunStats:
    """How a text came about; docs/METHODOLOGY.md defines each figure."""

    segments: int
    rows: int
    drafted: int
    accepted: int
    verified: int
    restarts: int
    draft_passes: int
    mean_accepted: float
    link_bytes: int
    schedule: str
    draft: str
    partition: str


@dataclass(frozen=True)
class Completion:
    """A finished generation."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    tokens_per_s: float  # after the first emission; see docs/METHODOLOGY.md
    ttft_ms: float  # from the request to the first token
    stats: RunStats

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class TextChunk:
    """What one verification added; the last chunk carries the completion."""

    text: str
    token_ids: list[int]
    completion: Completion | None = None


class LLM:
    """One model, cut over workers, ready to generate. A context manager; ``close`` ends the workers it started.

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
        hints: bool | None = None,
        in_process: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._tree = tree or TreeConfig()
        self._pipeline = pipeline or PipelineConfig()
        self._schedules = ScheduleConfig(flow=self._tree, pipeline=self._pipeline)
        self._link = link or LinkConfig()
        self._progress = progress or (lambda what, done: None)
        self._dtype: DType = dtype
        self._draft_dtype: DraftDType = draft_dtype
        self._device = device
        self._next_request_id = 0
        self._cluster: Cluster | None = None
        self._source: DraftSource | None = None
        self._experience = Experience()
        self.ready: list[Ready] = []  # what each worker said of its stage; empty in process
        self.last_stats: Stats | None = None  # all counts of the newest finished run, the workers' timings among them
        self._worker_bytes: dict[int, int] = {}  # the newest count of each worker, by stage
        if workers is not None and (in_process or not workers):
            raise UsageError("workers: name at least one address, and do not ask for in_process too")
        if in_process and self._link.int8_wire:
            raise UsageError("int8_wire: there is no wire in one process; leave in_process or int8_wire out")
        check_device(device)
        self._schedule_name = schedule
        self._costs: MeasuredCosts | None = None
        self.checkpoint = Checkpoint.open(model)
        self.partition = _choose_partition(self.checkpoint, stages, partition, workers)
        # Workers elsewhere have cores of their own; here they share what the driver leaves them.
        self._num_parallel = len(self.partition) if workers else min(len(self.partition), max(1, num_cores() - 1))
        chosen_draft = choose_draft(self.checkpoint, draft, draft_dtype)  # before any process is started
        self._make_schedule(schedule)
        if hints is None:
            hints = self._num_parallel == len(self.partition)
        place = draft_place(chosen_draft) if hints and isinstance(chosen_draft, Path) else None
        if in_process:
            self._cluster = InprocCluster(self.checkpoint, self.partition, dtype, device, place)
        else:
            self._cluster = self._connect(workers, place)
        try:
            self._load_driver(chosen_draft)
            if isinstance(self._cluster, RemoteCluster):
                self.ready = self._cluster.await_ready(lambda done: self._progress("loading", done))
                # Workers that share cores, or one accelerator, measure at the same time, and so nothing of use.
                if workers or (torch.device(device).type == "cpu" and num_cores() > len(self.partition)):
                    item_bytes = 1 if self._link.int8_wire else getattr(torch, dtype).itemsize
                    self._costs = MeasuredCosts(self.ready, self.checkpoint.hidden_size * item_bytes)
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
        cluster = RemoteCluster(workers, self._link, processes)
        try:
            cluster.configure(self.checkpoint.full_name, self.partition, self._dtype, hints=hints)
        except BaseException:
            cluster.close()
            raise
        return cluster

    def _load_driver(self, draft: ChosenDraft) -> None:
        self.tokenizer: PreTrainedTokenizerBase = self.checkpoint.load_tokenizer()
        head = TargetHead(self.checkpoint.load_lm_head(self._dtype, self._device))
        self._source = load_draft(
            draft, self.checkpoint, head, self._tree.top_k, self._dtype, self._device, draft_dtype=self._draft_dtype
        )
        self._driver = Driver(head, self._source, self._pipeline, self.checkpoint.max_positions, time.perf_counter)

    def _make_schedule(self, name: str) -> Schedule:
        steady_steps = 1 if self._source is None else self._source.steady_steps
        return make_schedule(
            name,
            self._schedules,
            len(self.partition),
            self._num_parallel,
            self._costs,
            steady_steps,
            self._experience,
        )

    # --- generating ---

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Completion:
        """Run one prompt (a text, or token ids) to its end; ``schedule`` for this run alone."""
        *_, last = self.stream(prompt, params, schedule=schedule)
        assert last.completion is not None
        return last.completion

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Iterator[TextChunk]:
        """As ``generate``, but yields text as soon as it is verified. Closing the iterator cancels the request."""
        prompt_ids = self._encode(prompt)
        return self._stream(prompt_ids, params or SamplingParams(), schedule or self._schedule_name)

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        is_text = isinstance(prompt, str)
        # ``verbose`` off: the tokenizer need not warn of long prompts, since they are refused below.
        prompt_ids = tuple(self.tokenizer(prompt, verbose=False).input_ids) if is_text else tuple(prompt)
        if not prompt or not prompt_ids:
            raise UsageError("the prompt is empty; give at least one token to continue")
        if not all(0 <= token_id < self.checkpoint.vocab_size for token_id in prompt_ids):
            raise UsageError(f"the prompt has token ids outside the vocabulary of {self.checkpoint.vocab_size}")
        if len(prompt_ids) >= self.checkpoint.max_positions:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens, but {self.checkpoint.name} has room for "
                f"{self.checkpoint.max_positions}, its answer included; shorten the prompt"
            )
        return prompt_ids

    def _stream(self, prompt_ids: tuple[int, ...], params: SamplingParams, name: str) -> Iterator[TextChunk]:
        if self._cluster is None:
            raise UsageError("this LLM is closed; make a new one")
        if params.temperature > 0 and params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        request = Request(self._next_request_id, prompt_ids, params, self.checkpoint.eos_token_ids)
        self._next_request_id += 1
        detokenizer = _Detokenizer(self.tokenizer, request.eos_ids)
        bytes_before, pace, num_seen = self._link_bytes(), _Pace(time.perf_counter()), 0
        generation, sends = self._driver.submit(request, self._make_schedule(name))
        try:
            self._cluster.send(sends)
            while True:
                self._pump(generation, num_seen)
                pace.note(len(generation.output_ids))
                new_ids, num_seen = generation.output_ids[num_seen:], len(generation.output_ids)
                if generation.is_finished:
                    break
                yield TextChunk(detokenizer.add(new_ids), new_ids)
        except FlowspecError:
            self.close()  # a pipeline with a hole is of no more use
            raise
        finally:
            if not generation.is_finished and self._cluster is not None:
                self._cluster.send(self._driver.cancel(generation))
        text = detokenizer.add(new_ids)
        num_bytes = self._link_bytes() - bytes_before
        yield TextChunk(text, new_ids, self._completion(generation, name, detokenizer.text, pace, num_bytes))

    def _completion(self, generation: Generation, schedule: str, text: str, pace: _Pace, link_bytes: int) -> Completion:
        assert generation.finish_reason is not None
        self.last_stats = stats = generation.stats
        return Completion(
            text,
            generation.output_ids,
            len(generation.request.prompt_ids),
            generation.finish_reason,
            pace.tokens_per_s,
            pace.ttft_ms,
            RunStats(
                stats.segments,
                stats.rows,
                stats.drafted,
                stats.accepted,
                stats.verified,
                stats.restarts,
                stats.draft_passes,
                round(stats.mean_accepted, 3),
                link_bytes,
                schedule,
                self._source.name if self._source is not None and schedule != "ar" else "none",
                str(self.partition),
            ),
        )

    def _pump(self, generation: Generation, num_seen: int) -> None:
        """Let driver and cluster work until the generation has more than ``num_seen`` tokens or has ended."""
        assert self._cluster is not None
        has_worked, last_news = True, time.monotonic()
        while not generation.is_finished and len(generation.output_ids) == num_seen:
            wait_s = 0.0 if has_worked else min(0.5, max(0.0, self._driver.wake_s - time.perf_counter()))
            for message in self._cluster.receive(wait_s):
                if isinstance(message, Result) and self._costs is not None:
                    self._costs.note(message.timings)
                self._cluster.send(self._driver.on_message(message))
                if not isinstance(message, Alive):
                    last_news = time.monotonic()
            sends = self._driver.on_idle()
            has_worked = sends is not None
            self._cluster.send(sends or [])
            if generation.num_prompt_verified < len(generation.request.prompt_ids) - 1:
                self._progress("prefill", generation.num_prompt_verified / len(generation.request.prompt_ids))
            if time.monotonic() - last_news > self._link.stall_timeout_s:
                raise WorkerError(
                    f"the pipeline has returned nothing for {self._link.stall_timeout_s:.0f} s; a worker hangs"
                )
        for timings in generation.stats.timings[-1:]:
            self._worker_bytes.update({timing.stage: timing.link_bytes for timing in timings})

    def _link_bytes(self) -> int:
        """Bytes on all links so far; the driver counts its own, the first hop included, workers the hops between."""
        assert self._cluster is not None
        return self._cluster.link_bytes + sum(b for stage, b in self._worker_bytes.items() if stage > 1)

    # --- ending ---

    def close(self) -> None:
        """End the workers that were started here; others go back to waiting. Safe to call twice."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Pace:
    """When tokens came out; docs/METHODOLOGY.md defines the two figures."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._first: tuple[float, int] | None = None  # time and number of tokens of the first emission
        self._last = (start_s, 0)

    def note(self, num_tokens: int) -> None:
        """So many tokens are out now."""
        self._last = (time.perf_counter(), num_tokens)
        self._first = self._first or self._last

    @property
    def ttft_ms(self) -> float:
        assert self._first is not None
        return (self._first[0] - self._start_s) * 1000

    @property
    def tokens_per_s(self) -> float:
        """Of the whole run when all tokens came at once."""
        assert self._first is not None
        since_s, num_before = self._first if self._first != self._last else (self._start_s, 0)
        return (self._last[1] - num_before) / (self._last[0] - since_s)


class _Detokenizer:
    """Token ids to text, piece by piece; a character whose bytes are still incomplete waits for the rest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._stream = DecodeStream(skip_special_tokens=True)
        self.text = ""

    def add(self, token_ids: Sequence[int]) -> str:
        backend: Any = self._tokenizer.backend_tokenizer
        pieces = [self._stream.step(backend, i) or "" for i in token_ids if i not in self._eos_ids]
        self.text += (piece := "".join(pieces))
        return piece


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
