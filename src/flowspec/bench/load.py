"""What many clients at once bring on one simulated cluster: throughput, and how long each waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flowspec.bench.study import Study
from flowspec.emulation.simulator import LoadRecord, simulate_load
from flowspec.errors import FlowspecError

ROUNDS = 2  # requests of each client, on average


@dataclass(frozen=True)
class LoadResult:
    """One schedule under one number of clients."""

    schedule: str
    num_clients: int
    tokens_per_s: float  # of all clients together, from the first request's submission to the last one's end
    ttft_ms: float  # median, waiting included
    tokens_per_s_each: float  # median decode rate of one request

    @classmethod
    def of(cls, schedule: str, num_clients: int, records: Sequence[LoadRecord]) -> LoadResult:
        num_tokens = sum(len(record.token_ids) for record in records)
        return cls(
            schedule,
            num_clients,
            num_tokens / max(record.emissions.last_s for record in records),
            1000 * statistics.median(record.emissions.ttft_s for record in records),
            statistics.median(len(record.token_ids) / record.emissions.total_s for record in records),
        )


def run_load(study: Study, counts: Sequence[int], progress: Callable[[float], None]) -> list[LoadResult]:
    """Every schedule under every number of clients, each in a closed loop, over the study's prompts in turn.

    Raises ``FlowspecError`` when a request's tokens depend on who else is there.
    """
    pair = study.pair.load(study.experiment.is_sampled)
    results, alone = list[LoadResult](), dict[int, tuple[int, ...]]()
    runs = [(schedule, count) for schedule in study.schedules for count in counts]
    for place, (schedule, count) in enumerate(runs):
        num_requests = max(len(study.prompts), ROUNDS * count)
        prompts = [(index, study.prompts[index % len(study.prompts)]) for index in range(num_requests)]
        records = simulate_load(study.experiment, pair, schedule, prompts, count)
        for record in records:
            if alone.setdefault(record.index, record.token_ids) != record.token_ids:
                raise FlowspecError(
                    f"request {record.index} has other tokens with {schedule} and {count} clients; please report this"
                )
        results.append(LoadResult.of(study.row_name(schedule), count, records))
        progress((place + 1) / len(runs))
    return results


def load_cells(results: Sequence[LoadResult]) -> list[list[str]]:
    """Headings, and a row for each schedule and number of clients."""
    rows = [
        [
            result.schedule,
            str(result.num_clients),
            f"{result.tokens_per_s:.2f}",
            f"{times:.2f}",
            f"{result.tokens_per_s_each:.2f}",
            f"{result.ttft_ms:.0f}",
        ]
        for result, times in zip(results, _times(results), strict=True)
    ]
    headings = ["schedule", "clients", "tokens/s", "x fewest", "tokens/s each", "to first token, ms"]
    return [headings, *rows]


def load_json(results: Sequence[LoadResult]) -> list[dict[str, Any]]:
    return [{**asdict(result), "times_fewest": times} for result, times in zip(results, _times(results), strict=True)]


def _times(results: Sequence[LoadResult]) -> list[float]:
    """Throughput in that of the same schedule under its fewest clients."""
    fewest = {r.schedule: min((x for x in results if x.schedule == r.schedule), key=_clients) for r in results}
    return [result.tokens_per_s / fewest[result.schedule].tokens_per_s for result in results]


def _clients(result: LoadResult) -> int:
    return result.num_clients
