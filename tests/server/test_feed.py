"""What the dashboard is told of a real engine behind a real service."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engines import engine_of
from flowspec.cluster.trips import Trip
from flowspec.config import EngineConfig, ScheduleConfig, ServerConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.engine.job import Job
from flowspec.engine.observer import Observer
from flowspec.errors import WorkerError
from flowspec.request.generation import Generation
from flowspec.request.stats import SegmentStats, Stats
from flowspec.request.work import Work
from flowspec.server.feed import MAX_REQUESTS, Feed
from flowspec.server.service import Service, Ticket
from flowspec.server.timeline import INBOX_LEN, Forwards, Span, Timeline
from flowspec.server.tree_view import MAX_NODES, PATH_LEN, Snapshot
from flowspec.wire.messages import Timing

PROMPT_IDS = [1, 4, 2, 1, 4, 2, 3]
TREE = TreeConfig(top_k=3, depth=4, max_depth=6, size=20, min_probability=0.0)
NUM_TOKENS = 24
DEADLINE_S = 60


@dataclass
class Page:
    """An open page: all that it was told."""

    feed: Feed
    request: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        """The last word on each piece of work, as the page keeps it."""
        told = [Span(**span) for event in self.events for span in event["spans"]]
        return list({(span.place, span.start_s, span.work, span.segment, span.request): span for span in told}.values())

    @property
    def trees(self) -> list[dict[str, Any]]:
        return [event["tree"] for event in self.events if event["tree"] is not None]

    async def look(self, is_enough: Callable[[dict[str, Any]], bool]) -> None:
        """Read events until one is enough; every one of them can be sent."""

        async def read() -> None:
            async with aclosing(self.feed.events(self.request)) as events:
                async for event in events:
                    self.events.append(json.loads(json.dumps(event, allow_nan=False)))
                    if is_enough(event):
                        return

        await asyncio.wait_for(read(), DEADLINE_S)


@asynccontextmanager
async def served(directory: Path, schedule: str = "flow", **options: Any) -> AsyncIterator[tuple[Service, Feed]]:
    feed = Feed()
    options = {
        "stages": 2,
        "names": ["kitchen", "attic"],
        "in_process": True,
        "schedule_config": ScheduleConfig(flow=TREE),
    } | options
    engine = engine_of(directory, draft=directory / "draft", schedule=schedule, **options)
    service = Service(engine, max_waiting=100, stuck_after_s=ServerConfig.stuck_after_s)
    feed.watch(service, "tiny")
    service.start()
    try:
        yield service, feed
    finally:
        await service.stop()


def has_ended(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: any(line["id"] == name and line["state"] == "finished" for line in event["requests"])


async def run(service: Service, name: str, num_tokens: int = NUM_TOKENS) -> Ticket:
    ticket = service.submit(name, PROMPT_IDS, SamplingParams(max_tokens=num_tokens))
    async for _ in ticket.chunks():
        pass
    return ticket


@pytest.mark.parametrize("schedule", ["flow", "lockstep", "ar"])
def test_forwards_of_every_stage_say_what_became_of_their_rows(
    checkpoint_dir: Callable[[str], Path], schedule: str
) -> None:
    page, stats = asyncio.run(_run_and_look(checkpoint_dir("llama"), schedule))
    _check_forwards(page, stats)


def test_so_they_do_with_worker_processes(checkpoint_dir: Callable[[str], Path]) -> None:
    page, stats = asyncio.run(_run_and_look(checkpoint_dir("qwen3"), "flow", in_process=False))
    _check_forwards(page, stats)
    times = [(span.start_s, span.end_s) for span in page.spans]
    now_s = page.events[-1]["now_s"]
    assert all(now_s - DEADLINE_S < start_s <= end_s <= now_s for start_s, end_s in times)
    stages = page.events[-1]["stages"]
    assert [stage["state"] for stage in stages] == ["up", "up"]
    assert all(stage["link_bytes"] > 0 and 0 <= stage["busy"] <= 1 for stage in stages)
    assert all(stage["round_trip_ms"] > 0 for stage in stages)


async def _run_and_look(directory: Path, schedule: str, **options: Any) -> tuple[Page, Stats]:
    async with served(directory, schedule, **options) as (service, feed):
        page = Page(feed)
        looking = asyncio.ensure_future(page.look(has_ended("one")))
        ticket = await run(service, "one")
        await looking
        assert ticket.job.stats is not None
        return page, ticket.job.stats


def _check_forwards(page: Page, stats: Stats) -> None:
    forwards = [span for span in page.spans if span.work == "forward"]
    assert all(span.request == "one" for span in forwards)
    assert all(span.accepted + span.wasted + span.pruned == span.rows > 0 for span in forwards)
    assert all(span.shared == span.rows for span in forwards), "nobody else ran"
    assert all(min(span.accepted, span.wasted, span.pruned) >= 0 for span in forwards)
    came_back = {segment_id for segment_id, segment in stats.by_segment.items() if segment.num_verified}
    for place in (1, 2):
        here = {span.segment: span for span in forwards if span.place == place and not span.prefill}
        assert came_back <= set(here)
        assert all(here[i].accepted == stats.by_segment[i].num_accepted for i in here)
        # Each token but the first, which the prompt's last one gave, came from a node that was accepted.
        assert sum(span.accepted for span in here.values()) == NUM_TOKENS - 1
        prompt = [span for span in forwards if span.place == place and span.prefill]
        assert [(span.rows, span.accepted) for span in prompt] == [(len(PROMPT_IDS), len(PROMPT_IDS))]


@pytest.mark.parametrize("schedule", ["flow", "lockstep"])
def test_the_drivers_work_is_told_with_its_segments(checkpoint_dir: Callable[[str], Path], schedule: str) -> None:
    page, stats = asyncio.run(_run_and_look(checkpoint_dir("llama"), schedule))
    spans = [span for span in page.spans if span.place == 0]
    counts = Counter(span.work for span in spans)
    assert counts["draft pass"] + counts["merging draft pass"] >= stats.draft_passes  # some found nothing
    assert counts["lm_head"] == stats.verified
    assert counts["send"] >= stats.segments  # empty segments too
    assert counts["verify"] >= stats.verdicts
    lm_heads = [span for span in spans if span.work == "lm_head"]
    assert {span.segment for span in lm_heads} >= {i for i, s in stats.by_segment.items() if s.num_verified}
    assert all(span.rows == stats.by_segment[span.segment].num_verified for span in lm_heads if span.segment > 0)
    assert 0 < page.events[-1]["driver_busy"] <= 1


def test_trees_are_connected_and_keep_their_ids_with_parents_first(checkpoint_dir: Callable[[str], Path]) -> None:
    async def watch_trees() -> Page:
        async with served(checkpoint_dir("mistral")) as (service, feed):
            page = Page(feed)
            while len(page.trees) < 3:  # the machine may be so fast that a request ends before the second one
                service.submit(f"after {len(page.events)}", PROMPT_IDS, SamplingParams(max_tokens=240))
                await page.look(lambda event: event["running"] == 0 or len(page.trees) >= 3)
            return page

    page = asyncio.run(watch_trees())
    tokens: dict[tuple[str, int], str] = {}
    for tree in page.trees:
        _check_tree(tree["nodes"])
        for node in tree["nodes"]:
            key = tree["request"], node["id"]
            assert tokens.setdefault(key, node["token"]) == node["token"], "ids are never used again"
            assert 0 <= node["probability"] <= 1 + 1e-9
    assert any(node["state"] in ("in_flight", "drafted") for tree in page.trees for node in tree["nodes"])


def _check_tree(nodes: list[dict[str, Any]]) -> None:
    seen: set[int] = set()
    for node in nodes:
        assert (node["parent"] is None) == (not seen), "one root, first of all"
        assert node["parent"] is None or node["parent"] in seen, "parents first"
        assert node["id"] not in seen
        seen.add(node["id"])
    path = [node for node in nodes if node["state"] == "accepted"]
    assert len(path) <= PATH_LEN + 1
    assert path == nodes[: len(path)]
    assert [node["parent"] for node in path[1:]] == [node["id"] for node in path[:-1]], "the text is a chain"
    assert sum(node["state"] in ("in_flight", "drafted") for node in nodes) < MAX_NODES


def test_nodes_that_died_in_flight_are_shown_once_more(checkpoint_dir: Callable[[str], Path]) -> None:
    snapshots: list[Snapshot] = []

    class Watcher(Observer):
        def on_result(self, job: Job, result: object) -> None:
            assert job.generation is not None
            snapshots.append(Snapshot.of(job.generation, 0.0))

    directory = checkpoint_dir("llama")
    with engine_of(
        directory,
        draft=directory / "draft",
        stages=2,
        in_process=True,
        schedule_config=ScheduleConfig(flow=TREE),
        schedule="flow",
    ) as engine:
        engine.observe(Watcher())
        job = engine.submit(PROMPT_IDS, SamplingParams(max_tokens=NUM_TOKENS))
        while not job.is_finished:
            engine.step()
        prompt_and_output = (*PROMPT_IDS, *job.output_ids)
    num_pruned = 0
    for before, after in pairwise(snapshots):
        nodes = after.nodes(before, str)
        _check_tree([dict(node) for node in nodes])
        pruned = [node for node in nodes if node["state"] == "pruned"]
        in_flight = {i for i, state in zip(before.node_ids, before.states, strict=True) if state == "in_flight"}
        assert {node["id"] for node in pruned} <= in_flight - set(after.node_ids)
        num_pruned += len(pruned)
        path = [int(node["token"]) for node in nodes if node["state"] == "accepted"]
        assert any(prompt_and_output[i : i + len(path)] == tuple(path) for i in range(len(prompt_and_output)))
    assert num_pruned, "a random draft guesses badly"


def test_requests_are_listed_through_all_their_states(checkpoint_dir: Callable[[str], Path]) -> None:
    async def check() -> None:
        async with served(checkpoint_dir("llama"), config=EngineConfig(max_running=1)) as (service, feed):
            long = SamplingParams(max_tokens=200)
            first, second = (service.submit(name, PROMPT_IDS, long) for name in ("first", "second"))
            page = Page(feed)
            await page.look(lambda event: bool(event["tree"]))
            lines = page.events[-1]["requests"]
            assert [(line["id"], line["state"]) for line in lines] == [("second", "waiting"), ("first", "running")]
            assert lines[1]["prompt_tokens"] == len(PROMPT_IDS)
            assert (page.events[-1]["running"], page.events[-1]["waiting"]) == (1, 1)
            assert page.events[-1]["tree"]["request"] == "first"

            service.cancel(first)
            theirs = Page(feed, "second")
            await theirs.look(lambda event: bool(event["tree"]))
            assert theirs.events[-1]["tree"]["request"] == "second"
            states = {line["id"]: line["state"] for line in theirs.events[-1]["requests"]}
            assert states == {"second": "running", "first": "cancelled"}
            service.cancel(second)
            third = await run(service, "third")
            assert third.job.stats is not None
            await page.look(has_ended("third"))
            newest = page.events[-1]["requests"][0]
            assert (newest["id"], newest["tokens"]) == ("third", NUM_TOKENS)
            assert newest["mean_accepted"] == third.job.stats.mean_accepted

    asyncio.run(check())


def test_ended_requests_leave_figures_and_nothing_else(checkpoint_dir: Callable[[str], Path]) -> None:
    async def check() -> None:
        async with served(checkpoint_dir("llama")) as (service, feed):
            for number in range(MAX_REQUESTS + 5):
                await run(service, f"r{number}", 2)
            page = Page(feed)
            await page.look(lambda event: True)
            names = [line["id"] for line in page.events[-1]["requests"]]
            assert names == [f"r{number}" for number in range(MAX_REQUESTS + 4, 4, -1)]
            assert page.events[-1]["tree"] is None
            gc.collect()
            kept = [thing for thing in _reachable(feed, service) if isinstance(thing, Ticket | Job | Generation)]
            assert not kept

    asyncio.run(check())


def _reachable(feed: Feed, service: Service) -> Iterator[object]:
    """What the feed itself holds, not counting the service."""
    seen, todo = {id(service), id(service.engine), id(asyncio)}, [feed.__dict__[name] for name in feed.__dict__]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type) or callable(thing):
            continue
        seen.add(id(thing))
        yield thing
        todo += gc.get_referents(thing)


def test_memory_is_bounded_while_nobody_looks() -> None:
    feed = Feed()
    for _ in range(INBOX_LEN + 100):
        feed.on_work(Work.DRAFT_PASS, 3, 0.0, 1.0)
    assert len(feed._timeline.inbox) == INBOX_LEN


def test_a_timeline_forgets_what_is_old() -> None:
    timeline = Timeline()
    for second in range(100):
        stats = SegmentStats(4, 0.0, num_verified=3, num_accepted=1)
        timeline.inbox.append(Forwards(0, second, (Timing(1, 4, second, second + 0.5, 0, 4),), stats))
        timeline.read(second + 1.0, {0: "one"}, {})
    assert len(timeline.since(0.0)) <= 31
    assert len(timeline._open) <= 3


def test_a_span_comes_again_when_its_rows_are_decided_later() -> None:
    timeline, stats = Timeline(), SegmentStats(4, 0.0)
    timeline.inbox.append(Forwards(0, 5, (Timing(1, 4, 1.0, 1.5, 0, 4), Timing(2, 3, 2.0, 2.5, 0, 3)), stats))
    timeline.read(2.6, {0: "one"}, {})
    assert [(span.accepted, span.wasted, span.pruned) for span in timeline.newer(0)] == [(0, 0, 4), (0, 0, 3)]
    number = timeline.num_spans
    stats.num_verified, stats.num_accepted = 3, 2
    timeline.read(2.7, {0: "one"}, {})
    assert timeline.newer(number) == [
        Span(1, 1.0, 1.5, "forward", "one", 5, 4, 2, 1, 1, shared=4),
        Span(2, 2.0, 2.5, "forward", "one", 5, 3, 2, 1, 0, shared=3),
    ]
    timeline.read(2.8, {0: "one"}, {})
    assert len(timeline.newer(number)) == 2, "nothing changed"


@pytest.mark.parametrize(("offset_s", "shown_s"), [(0.004, 1.0), (-0.006, 0.994), (700.0, 701.0)])
def test_only_a_clock_that_is_surely_another_is_corrected(offset_s: float, shown_s: float) -> None:
    timeline = Timeline()
    timeline.inbox.append(Forwards(0, 5, (Timing(1, 4, 1.0, 1.5, 0, 4),), None))
    timeline.read(shown_s + 1.0, {}, {1: Trip(0.01, offset_s)})
    [span] = timeline.newer(0)
    assert span.start_s == shown_s
    assert span.end_s - span.start_s == pytest.approx(0.5)


def test_the_state_describes_the_cluster(checkpoint_dir: Callable[[str], Path]) -> None:
    async def check() -> None:
        async with served(checkpoint_dir("llama")) as (_, feed):
            state = json.loads(json.dumps(feed.state(), allow_nan=False))
            assert (state["model"], state["schedule"], state["has_chat_template"]) == ("tiny", "flow", False)
            assert [(stage["stage"], stage["device"], stage["layers"]) for stage in state["stages"]] == [
                (1, "kitchen", "0:3"),
                (2, "attic", "3:6"),
            ]

    asyncio.run(check())


def test_a_failure_is_told_with_its_requests(
    checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with served(checkpoint_dir("llama")) as (service, feed):
            ticket = service.submit("one", PROMPT_IDS, SamplingParams(max_tokens=200))

            def fail(timeout_s: float) -> None:
                raise WorkerError("worker 2 ended")

            chunks = ticket.chunks()
            await anext(chunks)
            monkeypatch.setattr(service.engine.pipeline.connections, "receive", fail)
            with pytest.raises(WorkerError):
                [chunk async for chunk in chunks]
            page = Page(feed)
            await page.look(lambda event: True)
            event = page.events[-1]
            assert event["failure"] == "worker 2 ended"
            assert event["requests"][0]["state"] == "failed"
            assert {stage["state"] for stage in event["stages"]} == {"down"}

    asyncio.run(check())
