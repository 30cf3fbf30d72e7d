"""The offline Python API: a model over several workers, text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from flowspec.core import FinishReason, SamplingParams, TokenLogprobs
from flowspec.engine import Engine, Job
from flowspec.errors import UsageError
from flowspec.generation import Stats
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


class LLM:
    """One model, cut over workers, ready to generate; takes the arguments of ``engine.Engine``.

    A context manager; ``close`` ends the workers that it started.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Raises ``UsageError`` for what the caller can mend, ``WorkerError`` when a worker fails."""
        self.engine = Engine(*args, **options)
        self.checkpoint, self.partition, self.tokenizer = (
            self.engine.checkpoint,
            self.engine.partition,
            self.engine.tokenizer,
        )
        self.last_stats: Stats | None = None  # all counts of the newest finished run, the workers' timings among them

    # --- generating ---

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Completion:
        """Run one prompt (a text, or token ids) to its end; ``schedule`` for this run alone."""
        return self.generate_many([prompt], params, schedule=schedule)[0]

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> list[Completion]:
        """Run several prompts at once; each gives the text that it gives alone."""
        params = params or SamplingParams()
        bytes_before = self.engine.link_bytes
        all_ids = [self.encode(prompt) for prompt in prompts]
        for prompt_ids in all_ids:
            self.engine.check(prompt_ids, params, schedule)
        runs = [Run(self.engine, self.engine.submit(ids, params, schedule)) for ids in all_ids]
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

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        schedule: str | None = None,
    ) -> Iterator[TextChunk]:
        """As ``generate``, but yields text as soon as it is verified. Closing the iterator cancels the request."""
        prompt_ids = self.encode(prompt)
        params = params or SamplingParams()
        self.engine.check(prompt_ids, params, schedule)
        return self._stream(prompt_ids, params, schedule)

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a text, special tokens added. Raises ``UsageError`` for an empty one."""
        if not prompt:
            raise UsageError("the prompt is empty; give at least one token to continue")
        # ``verbose`` off: the tokenizer need not warn of long prompts, since they are refused.
        return tuple(self.tokenizer(prompt, verbose=False).input_ids) if isinstance(prompt, str) else tuple(prompt)

    def _stream(self, prompt_ids: Sequence[int], params: SamplingParams, schedule: str | None) -> Iterator[TextChunk]:
        bytes_before = self.engine.link_bytes
        run = Run(self.engine, self.engine.submit(prompt_ids, params, schedule))
        chunk = TextChunk("", [])
        try:
            while not run.is_finished:
                if run.job in self.engine.step():
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
            self.engine.progress("prefill", done / total)

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
        self._detokenizer = Detokenizer(engine.vocabulary, hidden_ids, params.stop, job.request.prompt_ids)
        self._num_read = 0

    def read(self) -> TextChunk:
        """What is new; a stop string ends the job."""
        new_ids = self.job.output_ids[self._num_read :]
        text = self._detokenizer.add(new_ids)
        if self._detokenizer.is_stopped:
            new_ids = new_ids[: self._detokenizer.num_tokens - self._num_read]
            self._engine.cancel(self.job)
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
            job.stopwatch.tokens_per_s,
            job.stopwatch.ttft_ms,
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
                engine.source.name if engine.source is not None and job.schedule != "ar" else "none",
                str(engine.partition),
            ),
        )
