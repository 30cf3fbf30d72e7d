"""The offline Python API: a model over several workers, text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

from flowspec.chat_template import Message
from flowspec.checked import checked, checked_class, takes_fields_of
from flowspec.core import FinishReason, SamplingParams, TokenLogprobs
from flowspec.engine.engine import Engine
from flowspec.engine.job import Job
from flowspec.engine.spec import EngineSpec, open_engine
from flowspec.errors import UsageError
from flowspec.request.stats import Stats
from flowspec.text import Detokenizer


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
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens, where they were asked for


@checked_class
class LLM:
    """One model, cut over workers, ready to generate. A context manager; ``close`` ends the workers that it started.

    Args:
        model: a directory, a .gguf file, a hub name (``owner/model``), ``"smollm2"`` once that was fetched, or
            ``"demo"``.
        draft: ``"auto"`` (the head that belongs to the model where it pays, or its MTP layer, else n-grams),
            ``"none"``, ``"ngram"``, the directory of an EAGLE head, a smaller language model (a directory, a .gguf
            file, a hub name, ``"smollm2"``), another copy of the model with an MTP layer, or a source of your own.
        draft_dtype: ``"int8"`` quantises the weights of a draft head, which are then read faster; guesses may get
            slightly worse, the text stays the same. ``"auto"`` is ``dtype``, or int8 where ``weights`` are integers.
            A smaller model as draft takes ``"int4"`` too; there, ``"auto"`` is as of ``weights``.
        draft_layers: the target's layers that a head reads (EAGLE-3, P-EAGLE, DFlash, DSpark), where its config is
            wrong or silent: k for the stream that enters layer k. docs/DRAFTS.md says how they are found otherwise.
        draft_check: ``"on"`` lets a draft head or model guess along a short text before the first request, and switches
            one off that is broken; what was found is kept for the next start. ``"off"`` takes it as it is.
        draft_worker: the address of a running worker, ``"host:port"``, that a smaller model as draft runs on; by
            default it runs in this process.
        stages: how many stages, 4 at most by default; the layers are shared out evenly.
        partition: the stages' layer ranges instead, ``"0:4,4:8"``.
        workers: addresses of running workers, ``"host:port"``, in pipeline order; by default processes on this machine.
        names: of these workers' devices, for messages; ``worker 1`` and so on by default.
        schedule: ``"auto"``, or the name of one of the schedules in the README.
        weights: ``"int8"`` and ``"int4"`` run the matrices on a processor's integer kernels, and the text is exact;
            ``"float"`` has them in ``dtype``. ``"auto"`` takes integers for quantised files, and for models that are
            larger than the devices' memory otherwise.
        dtype: type of weights and arithmetic; the text is exact in ``"float32"``.
        device: torch device of the driver and the workers here, ``"cpu"`` or ``"cuda:0"``.
        schedule_config: the settings of all schedules: what their draft trees may look like, and how a request is cut
            into segments (``flowspec.config.ScheduleConfig``).
        link: how many seconds the processes wait for each other, and for a lost device to come back
            (``flowspec.config.LinkConfig``).
        config: how many requests run at once, and in how much memory (``flowspec.config.EngineConfig``).
        hints: workers tell the driver early what they guess, where the draft has hint heads; by default where they
            do not share this machine's cores.
        in_process: run the workers in this process, one after the other; slow, for tests and debugging.
        progress: is told what long work is being done, and the share of it, from 0 to 1.

    Raises ``UsageError`` for what the caller can mend, ``WorkerError`` when a worker fails.
    """

    @takes_fields_of(EngineSpec)
    def __init__(self, spec: EngineSpec) -> None:
        self._progress = spec.progress
        self.engine = open_engine(spec)
        self.checkpoint, self.tokenizer = self.engine.model.checkpoint, self.engine.model.tokenizer
        self.partition = self.engine.partition
        self.last_stats: Stats | None = None  # all counts of the newest finished run, the workers' timings among them

    # --- generating ---

    @property
    def default_params(self) -> SamplingParams:
        """Where a call names none: those of the model's generation_config.json, else greedy."""
        return SamplingParams(**self.checkpoint.sampling_defaults)

    @checked
    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Completion:
        """Run one prompt (a text, or token ids) to its end; ``schedule`` for this run alone.

        ``params``: ``default_params`` if there are none.
        """
        return self._run([self.encode(prompt)], params, schedule)[0]

    @checked
    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> list[Completion]:
        """Run several prompts at once; each gives the text that it gives alone."""
        return self._run([self.encode(prompt) for prompt in prompts], params, schedule)

    @checked
    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Iterator[TextChunk]:
        """As ``generate``, but yields text as soon as it is verified. Closing the iterator cancels the request."""
        return self._open_stream(self.encode(prompt), params, schedule)

    @checked
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Completion:
        """Answer a conversation: messages with ``role`` and ``content``, the newest last, in the model's chat template.

        Raises ``UsageError`` for a model without one, and for messages that it refuses.
        """
        return self._run([self.encode_chat(messages)], params, schedule, is_chat=True)[0]

    @checked
    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Iterator[TextChunk]:
        """As ``chat``, but yields text as ``stream`` does."""
        return self._open_stream(self.encode_chat(messages), params, schedule, is_chat=True)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the answer begins."""
        return tuple(self.engine.model.chat_template.encode(messages))

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a text, special tokens added. Raises ``UsageError`` for an empty one."""
        if not prompt:
            raise UsageError("the prompt is empty; give at least one token to continue")
        # ``verbose`` off: the tokenizer need not warn of long prompts, since they are refused.
        return tuple(self.tokenizer(prompt, verbose=False).input_ids) if isinstance(prompt, str) else tuple(prompt)

    def _run(
        self,
        all_ids: Sequence[Sequence[int]],
        params: SamplingParams | None,
        schedule: str | None,
        is_chat: bool = False,
    ) -> list[Completion]:
        params = params or self.default_params
        bytes_before = self.engine.link_bytes
        for prompt_ids in all_ids:
            self.engine.check(prompt_ids, params, schedule)
        runs = [Run(self.engine, self.engine.submit(ids, params, schedule, is_chat)) for ids in all_ids]
        by_job = {run.job.request.request_id: run for run in runs}
        try:
            while not all(run.is_finished for run in runs):
                for job in self.engine.step():
                    by_job[job.request.request_id].read()
                    if job.error is not None:
                        raise job.error
                self._report_prefill(runs)
        finally:
            if not self.engine.is_closed:
                for run in runs:
                    self.engine.cancel(run.job)
        return [self._completion(run, bytes_before) for run in runs]

    def _open_stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None, schedule: str | None, is_chat: bool = False
    ) -> Iterator[TextChunk]:
        params = params or self.default_params
        self.engine.check(prompt_ids, params, schedule)
        return self._stream(prompt_ids, params, schedule, is_chat)

    def _stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, schedule: str | None, is_chat: bool
    ) -> Iterator[TextChunk]:
        bytes_before = self.engine.link_bytes
        run = Run(self.engine, self.engine.submit(prompt_ids, params, schedule, is_chat))
        chunk = TextChunk("", [])
        try:
            while not run.is_finished:
                if not run.has_news:  # else another stream's step has brought it
                    self.engine.step()
                if run.has_news:
                    chunk = run.read()
                    if run.job.error is not None:
                        raise run.job.error
                    if not run.is_finished:
                        yield chunk
                self._report_prefill([run])
        finally:
            if not self.engine.is_closed:
                self.engine.cancel(run.job)
        yield replace(chunk, completion=self._completion(run, bytes_before))

    def _completion(self, run: Run, bytes_before: int) -> Completion:
        assert run.job.generation is not None
        self.last_stats = run.job.generation.stats
        return run.completion(bytes_before)

    def _report_prefill(self, runs: Sequence[Run]) -> None:
        generations = [run.job.generation for run in runs if run.job.generation is not None]
        done = sum(generation.num_prompt_verified for generation in generations)
        total = sum(len(run.job.request.prompt_ids) - 1 for run in runs)
        if done < total:
            self._progress("prefill", done / total)

    # --- ending ---

    def close(self) -> None:
        """End the workers that were started here; others go back to waiting. Safe to call twice."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Run:
    """A job of an engine, and its text."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.job = job
        self.is_finished = False
        self._engine = engine
        params = job.request.params
        hidden_ids = job.request.eos_ids | params.stop_token_ids
        # An answer is a text of its own; its template has put what comes between it and the question.
        prompt_ids = () if job.is_chat else job.request.prompt_ids
        self._detokenizer = Detokenizer(engine.model.vocabulary, hidden_ids, params.stop, prompt_ids)
        self._num_read = 0

    @property
    def num_tokens(self) -> int:
        """That its text is made of, so far."""
        return self._num_read

    @property
    def has_news(self) -> bool:
        """Whether there is something to read, or the job has ended."""
        return self.job.is_finished or len(self.job.output_ids) > self._num_read

    def read(self) -> TextChunk:
        """What is new; a stop string ends the job."""
        new_ids = self.job.output_ids[self._num_read :]
        text = self._detokenizer.add(new_ids)
        if self._detokenizer.is_stopped:
            new_ids = new_ids[: self._detokenizer.num_tokens - self._num_read]
            self._engine.finish(self.job)
        logprobs = self.job.output_logprobs[self._num_read : self._num_read + len(new_ids)]
        self._num_read += len(new_ids)
        self.is_finished = self.job.is_finished
        if self.is_finished:
            text += self._detokenizer.finish()
        return TextChunk(text, new_ids, logprobs=logprobs)

    def completion(self, bytes_before: int) -> Completion:
        job, engine = self.job, self._engine
        assert job.generation is not None and job.generation.finish_reason is not None
        stats = job.generation.stats
        return Completion(
            self._detokenizer.text,
            job.output_ids[: self._num_read],
            len(job.request.prompt_ids),
            job.generation.finish_reason,
            job.emissions.tokens_per_s,
            1000 * job.emissions.ttft_s,
            RunStats(
                stats.segments,
                stats.rows,
                stats.drafted,
                stats.accepted,
                stats.verified,
                stats.restarts,
                stats.draft_passes,
                round(stats.mean_accepted, 3),
                engine.link_bytes - bytes_before,
                job.schedule,
                job.draft,
                str(engine.partition),
            ),
        )
