"""Schedules x prompts on this machine as it is, in real time: runs of an ``LLM`` -> records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from flowspec.bench.study import Records, check_same_tokens
from flowspec.core import SamplingParams
from flowspec.generation import Stats
from flowspec.llm import LLM
from flowspec.records import RequestRecord, SegmentRecord, Span

_WARM_UP_TOKENS = 16


def warm_up(llm: LLM, schedules: Sequence[str], prompt: str) -> None:
    """The first runs of a process are slower than all others."""
    for schedule in schedules:
        llm.generate(prompt, SamplingParams(_WARM_UP_TOKENS), schedule=schedule)


def run_local(
    llm: LLM,
    schedules: Sequence[str],
    prompts: Sequence[str],
    params: SamplingParams,
    repeats: int = 1,
    progress: Callable[[float], None] = lambda done: None,
) -> Records:
    """Every schedule over all prompts. They take turns at each prompt, so that the machine's noise hits all alike.

    Of the repeats the run with the median decode rate is kept. Prompt i is sampled with the seed ``params.seed`` + i.
    Raises ``FlowspecError`` when two runs of a prompt differ in their tokens.
    """
    kept: dict[str, list[RequestRecord]] = {schedule: [] for schedule in schedules}
    for index, prompt in enumerate(prompts):
        of_prompt = replace(params, seed=(params.seed or 0) + index)
        runs: dict[str, list[RequestRecord]] = {schedule: [] for schedule in schedules}
        for repeat in range(repeats):
            for schedule in schedules:
                runs[schedule].append(_run(llm, index, prompt, of_prompt, schedule))
            progress((index + (repeat + 1) / repeats) / len(prompts))
        for schedule, of_schedule in runs.items():
            check_same_tokens({f"{schedule}, run {i}": [record] for i, record in enumerate(of_schedule, 1)})
            kept[schedule].append(sorted(of_schedule, key=_tokens_per_s)[(repeats - 1) // 2])
        check_same_tokens({schedule: records[-1:] for schedule, records in kept.items()})
    return kept


def _tokens_per_s(record: RequestRecord) -> float:
    return record.num_decoded / record.decode_s


def _run(llm: LLM, index: int, prompt: str, params: SamplingParams, schedule: str) -> RequestRecord:
    """One run, timed from outside while its text streams."""
    token_ids: list[int] = []
    emissions: list[tuple[float, int]] = []  # (seconds since the start, tokens so far)
    start_s = time.perf_counter()
    completion = None
    for chunk in llm.stream(prompt, params, schedule=schedule):
        token_ids += chunk.token_ids
        emissions.append((time.perf_counter() - start_s, len(token_ids)))
        completion = chunk.completion
    assert completion is not None and llm.last_stats is not None
    (first_s, num_first), end_s = emissions[0], emissions[-1][0]
    stats, spans = completion.stats, _forwards(llm.last_stats, start_s)
    return RequestRecord(
        index,
        tuple(token_ids),
        first_s,
        num_first,
        end_s,
        stats.segments,
        stats.rows,
        stats.drafted,
        stats.accepted,
        stats.verified,
        stats.restarts,
        stats.draft_passes,
        stats.link_bytes,
        _busy_s(spans, len(llm.partition), first_s if end_s > first_s else 0.0, end_s),
        tuple(
            # When a segment was sent is not kept in real runs.
            SegmentRecord(segment_id, 0.0, segment.num_sent, segment.num_verified, segment.num_accepted)
            for segment_id, segment in llm.last_stats.by_segment.items()
        ),
        spans,
    )


def _forwards(stats: Stats, start_s: float) -> tuple[Span, ...]:
    """What the workers say of the segments that came back; on one machine their clock is the driver's."""
    return tuple(
        Span(timing.stage, timing.start_s - start_s, timing.end_s - start_s, "forward", timing.num_rows)
        for timings in stats.timings
        for timing in timings
    )


def _busy_s(spans: Sequence[Span], num_stages: int, start_s: float, end_s: float) -> tuple[float, ...]:
    """Of every place between two moments; the driver's own work is not measured and stays 0."""
    busy_s = [0.0] * (num_stages + 1)
    for span in spans:
        busy_s[span.place] += max(0.0, min(span.end_s, end_s) - max(span.start_s, start_s))
    return tuple(busy_s)
