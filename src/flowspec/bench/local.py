"""Schedules x prompts in real time, on this machine or over workers elsewhere: runs of an ``LLM`` -> records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from flowspec.bench.study import Records, check_same_tokens
from flowspec.core import SamplingParams
from flowspec.llm import LLM
from flowspec.request.emissions import Emissions
from flowspec.request.records import RequestRecord, forward_spans

_WARM_UP_TOKENS = 16


def encode(llm: LLM, prompt: str) -> tuple[int, ...]:
    """A question, for a model that chats; else the beginning of a text."""
    if llm.engine.model.chat_template.is_there:
        return llm.encode_chat([{"role": "user", "content": prompt}])
    return llm.encode(prompt)


def warm_up(llm: LLM, schedules: Sequence[str], prompt: str) -> None:
    """The first runs of a process are slower than all others."""
    for schedule in schedules:
        llm.generate(encode(llm, prompt), SamplingParams(_WARM_UP_TOKENS), schedule=schedule)


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
    start_s, emissions = time.perf_counter(), Emissions(0.0)
    completion = None
    for chunk in llm.stream(encode(llm, prompt), params, schedule=schedule):
        token_ids += chunk.token_ids
        emissions.note(time.perf_counter() - start_s, len(token_ids))
        completion = chunk.completion
    assert completion is not None and llm.last_stats is not None
    # Each worker has a clock of its own, unless it runs here. The driver's own work is not measured.
    to_driver_s = {stage: trip.to_driver_s for stage, trip in llm.engine.pipeline.connections.trips.items()}
    spans, num_places = forward_spans(llm.last_stats, start_s, to_driver_s), len(llm.partition) + 1
    num_bytes = completion.stats.link_bytes
    return RequestRecord.of(
        index, token_ids, emissions, llm.last_stats, spans, num_places, num_bytes, with_spans=True, start_s=start_s
    )
