"""The barrier of the lock-step schedules: who waits for what, and what enters and leaves in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowspec.config import LockstepConfig, ScheduleConfig, TreeConfig
from flowspec.core import FINAL, SamplingParams
from flowspec.emulation import experiment as page
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Experiment, Faults
from flowspec.emulation.pairs import SyntheticPair
from flowspec.emulation.simulator import simulate
from flowspec.model.synthetic import SyntheticStage
from flowspec.request.generation import Generation
from flowspec.request.records import RequestRecord
from flowspec.schedule.base import Schedule
from flowspec.schedule.catalogue import make_schedule
from flowspec.wire.actor import Send
from flowspec.wire.messages import LAST_STEP, Close, Commit, Message, Open, Result, Segment, Step
from flowspec.worker.actor import Worker

NANO = ClusterDescription.load(Path(__file__).parents[2] / "clusters" / "7b-nano-150m.toml")
NUM_STAGES = NANO.num_stages
PAIR = SyntheticPair("eagle1")
STEPPED = ("lockstep", "lockstep-no-score-order", "lockstep-no-prune", "lockstep-no-expand", "pipedec")
PROMPTS = ("a", "b", "c")


# --- one worker ---


def open_worker(is_first: bool = True, is_last: bool = False, request_ids: Sequence[int] = (0,)) -> Worker:
    """With the root 0 of each request, whose segment has no gate, computed already."""
    worker = Worker(SyntheticStage(is_first, is_last), 1, lambda: 0.0)
    for request_id in request_ids:
        worker.on_message(Open(request_id, 0, 0, [FINAL]))
        worker.on_message(segment(0, [0], gate=None, request_id=request_id, is_first=is_first))
        assert worker.on_idle() is not None and worker.on_idle() is not None
    return worker


def segment(
    segment_id: int, node_ids: list[int], gate: int | None, request_id: int = 0, is_first: bool = True
) -> Segment:
    """Children of the root 0 (the root itself has parent -1), as they come from the driver or from a worker."""
    num = len(node_ids)
    positions, parents = [min(i, 1) for i in node_ids], [0 if i else -1 for i in node_ids]
    token_ids = [7] * num if is_first else None
    hidden = None if is_first else torch.zeros(num, SyntheticStage.hidden_size, dtype=torch.int64)
    return Segment(request_id, 0, segment_id, node_ids, parents, positions, 0, token_ids, hidden, [], gate)


def only(sends: list[Send] | None) -> Any:
    assert sends is not None and len(sends) == 1
    return sends[0].message


def test_a_segment_waits_for_its_step_and_for_no_later_one() -> None:
    worker = open_worker()
    worker.on_message(segment(1, [1], gate=3))
    assert worker.on_idle() is None
    for number in (1, 2):
        worker.on_message(Step(0, 0, number))
        assert worker.on_idle() is None
    worker.on_message(Step(0, 0, 3))
    passed_on = only(worker.on_idle())
    assert passed_on.node_ids == [1] and passed_on.gate == 4, "the next worker runs it one step later"
    assert worker.on_idle() is None


def test_a_step_that_came_before_the_segment_counts() -> None:
    worker = open_worker()
    worker.on_message(Step(0, 0, 5))
    worker.on_message(Step(0, 0, 4))  # steps never go back
    worker.on_message(segment(1, [1], gate=5))
    assert only(worker.on_idle()).node_ids == [1]


def test_a_step_of_another_request_or_epoch_opens_nothing() -> None:
    worker = open_worker(request_ids=(0, 1))
    worker.on_message(segment(1, [1], gate=1))
    worker.on_message(Step(1, 0, 9))
    worker.on_message(Step(0, 1, 9))
    assert worker.on_idle() is None


def test_a_request_that_waits_does_not_hold_up_another_but_keeps_its_own_order() -> None:
    worker = open_worker(request_ids=(0, 1))
    worker.on_message(segment(1, [1], gate=2))
    worker.on_message(segment(2, [2], gate=1))  # behind one that waits
    worker.on_message(segment(1, [1], gate=None, request_id=1))
    worker.on_message(Close(1, 0))
    worker.on_message(Step(0, 0, 1))
    assert [type(message) for message in drain(worker)] == [Segment, Close]
    assert worker.num_open == 1
    worker.on_message(Step(0, 0, 2))
    assert [message.segment_id for message in drain(worker)] == [1, 2]


def drain(worker: Worker) -> list[Any]:
    messages: list[Any] = []
    while (sends := worker.on_idle()) is not None:
        messages += [send.message for send in sends]
    return messages


def test_what_was_committed_before_the_step_is_pruned_from_the_segment() -> None:
    worker = open_worker()
    worker.on_message(segment(1, [1, 2], gate=None))
    drain(worker)
    below = Segment(0, 0, 2, [3, 4], [1, 2], [2, 2], 0, [7, 7], None, [], 1)
    worker.on_message(below)
    worker.on_message(Commit(0, 0, [0], 2))
    assert worker.on_idle() is None
    worker.on_message(Step(0, 0, 1))
    assert only(worker.on_idle()).node_ids == [4]
    worker.check_integrity()


@pytest.mark.parametrize("node_ids", [[], [9]])
def test_a_gated_segment_without_a_living_row_still_travels(node_ids: list[int]) -> None:
    dead_parents = [8] * len(node_ids)
    for is_first, is_last in ((True, False), (False, False), (False, True)):
        worker = open_worker(is_first, is_last)
        num = len(node_ids)
        hidden = None if is_first else torch.zeros(num, SyntheticStage.hidden_size, dtype=torch.int64)
        tokens = [7] * num if is_first else None
        worker.on_message(Segment(0, 0, 1, node_ids, dead_parents, [2] * num, 0, tokens, hidden, [], 1))
        assert worker.on_idle() is None
        worker.on_message(Step(0, 0, 1))
        message = only(worker.on_idle())
        assert isinstance(message, Result if is_last else Segment)
        assert message.segment_id == 1 and message.node_ids == []
        assert message.hidden is not None and len(message.hidden) == 0
        assert [timing.num_rows for timing in message.timings] == [0]


def test_after_the_last_step_nothing_waits_and_close_passes() -> None:
    worker = open_worker()
    for i, gate in enumerate((5, 10, 2**40), start=1):
        worker.on_message(segment(i, [i], gate))
    worker.on_message(Close(0, 0))
    assert worker.on_idle() is None, "close keeps its place in the line"
    worker.on_message(Step(0, 0, LAST_STEP))
    assert [type(message) for message in drain(worker)] == [Segment, Segment, Segment, Close]
    assert worker.num_open == 0


# --- whole requests, in the simulator ---


@dataclass(frozen=True)
class Sent:
    """One segment as it left, with its nodes' scores in the driver's tree."""

    segment: Segment
    scores: list[float]


@dataclass
class Watched:
    """A schedule whose results and messages are written down in their order."""

    inner: Schedule
    name: str
    uses_draft: bool
    wants_hints: bool
    wants_ngrams: bool
    awaits_passes: bool
    tree_config: TreeConfig
    events: list[Sent | Result | Message] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)  # emitted so far, at each step

    def on_result(self, generation: Generation, result: Result) -> None:
        self.events.append(result)
        self.inner.on_result(generation, result)
        self._note(generation)

    def on_idle(self, generation: Generation) -> float:
        wake_s = self.inner.on_idle(generation)
        self._note(generation)
        return wake_s

    def _note(self, generation: Generation) -> None:
        for send in generation.outbox:
            message = send.message
            if isinstance(message, Segment):
                rows = generation.tree.rows_of(np.array(message.node_ids, dtype=np.int64))
                self.events.append(Sent(message, generation.tree.scores[rows].tolist()))
            else:
                self.events.append(message)
                if isinstance(message, Step):
                    self.num_tokens.append(len(generation.output_ids))

    @property
    def sent(self) -> list[Sent]:
        return [event for event in self.events if isinstance(event, Sent)]


def watch(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    prompt: str,
    num_tokens: int = 60,
    faults: Faults | None = None,
    config: ScheduleConfig | None = None,
) -> tuple[Watched, RequestRecord]:
    made: list[Watched] = []

    def make_watched(*args: Any, **options: Any) -> Watched:
        inner = make_schedule(*args, **options)
        made.append(
            Watched(
                inner,
                inner.name,
                inner.uses_draft,
                inner.wants_hints,
                inner.wants_ngrams,
                inner.awaits_passes,
                inner.tree_config,
            )
        )
        return made[-1]

    monkeypatch.setattr(page, "make_schedule", make_watched)
    params = SamplingParams(max_tokens=num_tokens)
    experiment = Experiment(NANO, config or ScheduleConfig(), params, faults=faults or Faults(), with_spans=True)
    record = simulate(experiment, PAIR, name, [(0, prompt)])[0]
    return made[-1], record  # the simulator makes one before, to ask whether it wants hints


def by_round(watched: Watched) -> list[list[Sent]]:
    """The segments of each round: the gates of the next one begin where the last step has left no one waiting."""
    rounds: list[list[Sent]] = []
    for sent in watched.sent:
        gate = sent.segment.gate
        assert gate is not None
        if not rounds or gate != (rounds[-1][-1].segment.gate or 0) + 1:
            rounds.append([])
        rounds[-1].append(sent)
    return rounds


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("faults", [Faults(), Faults(900.0, seed=4)], ids=["plain", "late"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_in_each_step_exactly_one_result_reaches_the_driver(
    monkeypatch: pytest.MonkeyPatch, name: str, faults: Faults, prompt: str
) -> None:
    watched, _ = watch(monkeypatch, name, prompt, faults=faults)
    first_id, num_results, num_steps, last_step, num_empty = -1, 0, 0, 0, 0
    seen: list[int] = []
    for event in watched.events:
        match event:
            case Sent(segment) if first_id < 0:
                first_id, num_results, num_steps = segment.segment_id, 0, 0
            case Result() if event.segment_id:  # not the prompt's
                seen.append(event.segment_id)
                num_empty += not event.node_ids
                num_results += 0 <= first_id <= event.segment_id
            case Step(number=number) if number != LAST_STEP:
                assert first_id >= 0
                num_steps += 1
                assert num_results == num_steps, "a step for each result, and no result before its step"
                if number != last_step + 1:
                    first_id = -1  # the round is over: nothing waits
                last_step = number
            case _:
                pass
    assert num_empty, "the case did not occur"
    sent_ids = [sent.segment.segment_id for sent in watched.sent]
    assert seen == sent_ids[: len(seen)], "each comes back once, in order"
    assert len(seen) >= len(sent_ids) - NUM_STAGES - 1


@pytest.mark.parametrize("name", STEPPED)
def test_a_round_fills_the_pipeline_and_the_driver(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    watched, _ = watch(monkeypatch, name, "a")
    assert all(len(segments) >= NUM_STAGES + 1 for segments in by_round(watched))
    last = next(event for event in reversed(watched.events) if isinstance(event, Step))
    assert last.number == LAST_STEP


def test_without_pruning_the_workers_compute_more(monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows: dict[str, list[int]] = {}
    for name in ("lockstep", "lockstep-no-prune"):
        records = [watch(monkeypatch, name, prompt)[1] for prompt in PROMPTS]
        num_rows[name] = [sum(span.num_rows for span in record.spans if span.place) for record in records]
    pairs = list(zip(num_rows["lockstep"], num_rows["lockstep-no-prune"], strict=True))
    assert all(pruned <= unpruned for pruned, unpruned in pairs)
    assert any(pruned < unpruned for pruned, unpruned in pairs)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_without_expansion_a_round_has_its_first_segments_only(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    def most_segments(name: str) -> int:
        rounds = by_round(watch(monkeypatch, name, prompt)[0])
        return max(sum(bool(sent.segment.node_ids) for sent in segments) for segments in rounds)

    assert most_segments("lockstep-no-expand") <= NUM_STAGES + 1 < most_segments("lockstep")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_step_that_has_verified_nothing_sends_nothing_unless_the_tree_is_to_be_deepened(
    monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    deepening = LockstepConfig(deepen=True)
    plain, deepened = (
        watch(monkeypatch, "lockstep", prompt, config=ScheduleConfig(lockstep=config))
        for config in (LockstepConfig(), deepening)
    )
    assert deepened[1].token_ids == plain[1].token_ids
    num_empty = [sum(not sent.segment.node_ids for sent in watched.sent) for watched, _ in (plain, deepened)]
    assert num_empty[0] > 2 * num_empty[1]
    # An appended segment is a whole new tree at most; what deepening adds is smaller still.
    num_rows = {len(sent.segment.node_ids) for watched, _ in (plain, deepened) for sent in watched.sent}
    assert max(num_rows) <= LockstepConfig().expand_size


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_level_of_pipedec_is_full_even_below_a_single_node(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    width = ScheduleConfig().pipedec_width
    for segments in by_round(watch(monkeypatch, "pipedec", prompt)[0]):
        root, first = segments[0].segment, segments[1].segment
        assert set(first.parent_ids) <= set(root.node_ids)
        assert len(first.node_ids) in (0, width), "none where the text ends with the root"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pipedec_sends_one_level_and_commits_one_token_in_each_step(
    monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    watched, record = watch(monkeypatch, "pipedec", prompt)
    steps = [0, *watched.num_tokens]
    # The prompt's own result gives the first token, before any step.
    assert all(after - before <= 1 for before, after in pairwise(steps[1:])) and steps[1] <= 2
    for sent in watched.sent:
        assert len(sent.segment.node_ids) <= ScheduleConfig().pipedec_width
        assert len(set(sent.segment.positions)) <= 1, "a segment is one level"
    assert len(record.token_ids) == 60


@pytest.mark.parametrize("prompt", PROMPTS)
def test_chunked_cuts_each_tree_into_equal_chunks(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    watched, _ = watch(monkeypatch, "chunked", prompt)
    trees: list[list[int]] = []
    is_new = True
    for event in watched.events:
        if isinstance(event, Sent):
            trees += [[]] if is_new else []
            trees[-1].append(len(event.segment.node_ids))
        is_new = not isinstance(event, Sent)
    assert len(trees) > 3
    for sizes in trees:
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes), "the longer ones last"
        assert len(sizes) == NUM_STAGES + 1 or sum(sizes) < NUM_STAGES + 1, "unless there are fewer nodes"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_first_segments_of_a_lockstep_round_are_in_the_order_of_scores(
    monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    rounds = by_round(watch(monkeypatch, "lockstep", prompt)[0])
    assert len(rounds) > 2
    for segments in rounds:
        fill = segments[: NUM_STAGES + 1]
        assert fill[0].scores[0] == 0.0, "the root comes first"
        scores = [sent.scores for sent in fill if sent.scores]
        assert all(min(left) >= max(right) for left, right in pairwise(scores))
        sizes = [len(sent.scores) for sent in fill]
        assert max(sizes) - min(sizes) <= 1


def test_without_score_order_the_first_segments_go_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = by_round(watch(monkeypatch, "lockstep-no-score-order", "a")[0])
    for segments in rounds:
        positions = [sent.segment.positions for sent in segments[: NUM_STAGES + 1] if sent.segment.positions]
        assert all(max(left) <= min(right) for left, right in pairwise(positions))
    assert any(
        min(left.scores) < max(right.scores)
        for segments in rounds
        for left, right in pairwise(segments[: NUM_STAGES + 1])
        if left.scores and right.scores
    ), "which is not the order of scores"
