"""Prometheus metrics: vLLM's names where it has one, under ``flowspec:``; and what only a pipeline with trees has."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flowspec.core import Ending
from flowspec.engine.job import Job
from flowspec.engine.observer import Observer
from flowspec.engine.telemetry import Status
from flowspec.request.stats import Stats
from flowspec.server.service import Service

disable_created_metrics()  # a second series for each counter, of which nobody asks

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 160)
_INTERVAL_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 20)
_E2E_S = (0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_MAX_POSITION = 32  # acceptance is counted by position up to here


class Metrics(Observer, Collector):
    """An observer of a service's engine, and what Prometheus reads of it."""

    def __init__(self, model: str) -> None:
        self._service: Service | None = None
        self._labels = {"model_name": model}
        self._registry = CollectorRegistry()
        self._ttft_s = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT_S)
        self._interval_s = self._histogram(
            "inter_token_latency_seconds", "Between two tokens; those that come at once share their time.", _INTERVAL_S
        )
        self._e2e_s = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _E2E_S)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that gave tokens.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Those that an earlier request had computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self._success = self._counter("request_success", "Requests that finished, by reason.", "finished_reason")
        self._cancelled = self._counter("request_cancelled", "Requests whose client went away.")
        self._failed = self._counter("request_failed", "Requests that the engine refused, or that died with it.")
        self._drafts = self._counter("spec_decode_num_drafts", "Verifications that emitted tokens.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Draft nodes that were sent.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft nodes that became output.")
        self._by_position = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "By their place among those of one verification.", "position"
        )
        self._pruned = self._counter("pruned_in_flight", "Draft nodes that died on their way.")
        self._restarts = self._counter("restarts", "Times that the target's token was not in the tree.")
        self._preemptions = self._counter("num_preemptions", "Times that a request gave its KV cache up to others.")
        self._tree_size = self._histogram(
            "tree_rows_in_flight", "Nodes of a request under way.", (1, 4, 16, 32, 64, 128)
        )
        self._registry.register(self)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flowspec:{name}", text, (*self._labels, *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"flowspec:{name}", text, tuple(self._labels), registry=self._registry, buckets=buckets)

    def watch(self, service: Service) -> None:
        self._service = service
        service.engine.observe(self)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    # --- on the engine's thread ---

    def on_tokens(self, job: Job, num_new: int, interval_s: float | None) -> None:
        labels = self._labels
        self._generation_tokens.labels(**labels).inc(num_new)
        if job.generation is not None:
            in_flight = sum(len(ids) for ids in job.generation.in_flight.values())
            self._tree_size.labels(**labels).observe(in_flight)
        if interval_s is None:
            self._prompt_tokens.labels(**labels).inc(len(job.request.prompt_ids))
            self._cached_tokens.labels(**labels).inc(job.num_cached)
            self._ttft_s.labels(**labels).observe(job.emissions.ttft_s)
            return
        for _ in range(num_new):
            self._interval_s.labels(**labels).observe(interval_s / num_new)

    def on_end(self, job: Job) -> None:
        if job.stats is not None:
            self._count(job.stats)
        match job.ending:
            case Ending.FINISHED:
                assert job.end_s is not None
                self._e2e_s.labels(**self._labels).observe(job.end_s - job.emissions.start_s)
                self._success.labels(**self._labels, finished_reason=job.finish_reason or "stop").inc()
            case Ending.CANCELLED:
                self._cancelled.labels(**self._labels).inc()
            case _:
                self._failed.labels(**self._labels).inc()

    def _count(self, stats: Stats) -> None:
        labels = self._labels
        self._drafts.labels(**labels).inc(stats.verdicts if stats.drafted else 0)
        self._draft_tokens.labels(**labels).inc(stats.drafted)
        self._accepted.labels(**labels).inc(stats.accepted)
        self._pruned.labels(**labels).inc(stats.pruned)
        self._restarts.labels(**labels).inc(stats.restarts)
        self._preemptions.labels(**labels).inc(stats.preemptions)
        for position, num_accepted in enumerate(stats.accepted_by_position[:_MAX_POSITION]):
            self._by_position.labels(**labels, position=str(position)).inc(num_accepted)

    # --- Collector ---

    def collect(self) -> Iterable[Metric]:
        """What is read when it is asked for."""
        service, names = self._service, tuple(self._labels)
        if service is None:
            return
        status, values = service.engine.status(), tuple(self._labels.values())
        gauges = {
            "num_requests_running": ("Requests that are being generated.", status.num_running),
            "num_requests_waiting": ("Requests that wait to be started.", service.num_waiting),
            "kv_cache_usage_perc": (
                "Share of the slots in the KV caches that running requests hold; 1 is all.",
                status.kv_usage or 0.0,
            ),
            "devices_away": ("Devices that are lost, and awaited.", sum(s.state == "away" for s in status.stages)),
        }
        if status.draft_worker is not None:
            text = "As kv_cache_usage_perc, at the worker that a smaller model as draft runs on."
            gauges["draft_kv_cache_usage_perc"] = text, status.draft_worker.kv_usage
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"flowspec:{name}", text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        recoveries = CounterMetricFamily("flowspec:recoveries", "Times that lost devices came back.", labels=names)
        recoveries.add_metric(values, status.num_recoveries)
        yield recoveries
        if status.draft_worker is not None:
            text = "To the worker that a smaller model as draft runs on, and back."
            draft_bytes = CounterMetricFamily("flowspec:draft_link_bytes", text, labels=names)
            draft_bytes.add_metric(values, status.draft_worker.link_bytes)
            yield draft_bytes
        yield from self._stages(status, service.uptime_s)

    def _stages(self, status: Status, uptime_s: float) -> Iterable[Metric]:
        names = (*self._labels, "stage")
        busy = CounterMetricFamily("flowspec:stage_busy_seconds", "In forwards whose results came back.", labels=names)
        idle = CounterMetricFamily("flowspec:stage_idle_seconds", "All other time since the start.", labels=names)
        sent = CounterMetricFamily("flowspec:link_bytes", "Received by a stage on the data path.", labels=names)
        trip = GaugeMetricFamily("flowspec:link_round_trip_seconds", "Driver to stage and back.", labels=names)
        for stage in status.stages:
            labels = (*self._labels.values(), str(stage.stage))
            busy.add_metric(labels, stage.busy_s)
            idle.add_metric(labels, max(0.0, uptime_s - stage.busy_s))
            sent.add_metric(labels, stage.link_bytes)
            if stage.trip is not None:
                trip.add_metric(labels, stage.trip.round_trip_s)
        yield from (busy, idle, sent, trip)
