"""Teams of threads: a row's bits are those of one thread, and helpers are there for no longer than they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowspec.core import LayerRange
from flowspec.model import compiled_stage
from flowspec.model.compiled_stage import CompiledHead, CompiledStage
from flowspec.model.loader import Checkpoint
from flowspec.model.mailbox_kernel import ALONE, DONE, OWNER
from flowspec.model.shared_kernel import write_and_attend
from flowspec.model.slot_kernel import NUM_FIELDS, NUM_KV_HEADS, SEEN_END
from flowspec.model.stage import Part, forward
from flowspec.model.team import Team
from tiny_models import FAMILIES, VOCAB_SIZE

DEADLINE_S = 30


class Eager(Team):
    """It shares out whatever can be, and does not mind helpers that are late."""

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads, unit_ns=1)

    @property
    def mailbox(self) -> Any:
        found = super().mailbox
        found[ALONE : ALONE + 1] = 0
        return found


@pytest.fixture(scope="module", params=[2, 3])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    found = Eager(request.param)
    yield found
    found.close()


def with_team(team: Team, load: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_stage, "team_of", lambda num_threads: team)
        return load()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.001)


def run(stage: Any, counts: list[int]) -> Tensor:
    """Segments of one request."""
    cache, rows, begin = stage.open_cache(), [], 0
    for count in counts:
        tokens = torch.arange(begin, begin + count) * 7 % VOCAB_SIZE
        rows.append(forward(stage, tokens, cache.slots.append_prefix(range(begin, begin + count)), cache))
        begin += count
    return torch.cat(rows)


@pytest.mark.parametrize(("family", "bits"), [*((family, 8) for family in FAMILIES), ("llama", 4), ("mixtral", 4)])
def test_bits_are_those_of_one_thread(
    checkpoint_dir: Callable[[str], Path], family: str, bits: Any, team: Team
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(family))

    def load() -> tuple[CompiledStage, CompiledHead]:
        return CompiledStage.load(checkpoint, LayerRange(0, 6), "float32", bits), CompiledHead.load(checkpoint, 8)

    stage, head = load()
    shared_stage, shared_head = with_team(team, load)
    for counts in ([70, 1, 2, 3], [1, 16, 64, 5]):
        wanted = run(stage, counts)
        found = run(shared_stage, counts)
        assert torch.equal(found, wanted) and torch.equal(shared_head.logits(found), head.logits(wanted))
    assert team.mailbox[DONE] > 0, "nothing was shared out"


def test_requests_of_one_forward_have_the_bits_that_they_have_alone(
    checkpoint_dir: Callable[[str], Path], team: Team
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("mistral"))
    stage = with_team(team, lambda: CompiledStage.load(checkpoint, LayerRange(0, 3), "float32", 8))
    counts, parts = [5, 60, 1, 30], []
    for count in counts:
        cache = stage.open_cache()
        tokens = torch.arange(count) * 7 % VOCAB_SIZE
        parts.append(Part(tokens, cache.slots.append_prefix(range(count)), cache))
    *_, together = stage.steps(parts)
    assert together is not None and torch.equal(together, torch.cat([run(stage, [1] * count) for count in counts]))


def test_helpers_come_when_there_is_work_and_leave_also_what_is_given_up(
    checkpoint_dir: Callable[[str], Path], team: Team
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("llama"))
    stage = with_team(team, lambda: CompiledStage.load(checkpoint, LayerRange(0, 4), "float32", 8))
    wait_until(lambda: team.num_called == 0)
    cache = stage.open_cache()
    given_up = stage.steps([Part(torch.tensor([5]), cache.slots.append_prefix([0]), cache)])
    assert next(given_up) is None
    given_up.close()
    wait_until(lambda: team.num_called == 0)
    wait_until(lambda: torch.equal(run(stage, [2, 3]), run(stage, [5])) and team.num_called > 0)
    wait_until(lambda: team.num_called == 0)


def test_whoever_finds_the_mailbox_taken_works_alone(checkpoint_dir: Callable[[str], Path], team: Team) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("llama"))
    stage = with_team(team, lambda: CompiledStage.load(checkpoint, LayerRange(0, 4), "float32", 8))
    wanted = run(stage, [20])
    team.mailbox[OWNER] = 1
    team.mailbox[DONE] = -1
    try:
        assert torch.equal(run(stage, [20]), wanted) and team.mailbox[DONE] == -1
    finally:
        team.mailbox[OWNER] = 0


def test_no_memory_is_an_error_of_the_caller(team: Team) -> None:
    """Whoever of the team finds none; and the mailbox is free again."""
    table = np.zeros((1, NUM_FIELDS), np.int64)
    table[0, [1, SEEN_END, NUM_KV_HEADS]] = 2, 1 << 50, 2
    # STARTS of two empty paths; nothing is written to slots, as no key has any width.
    starts, slots = np.zeros(3, np.int64), np.zeros(2, np.int64)
    table[0, 2:4] = slots.ctypes.data, starts.ctypes.data
    query, key = np.ones((2, 2, 16), np.float32), np.ones((2, 2, 0), np.float32)
    for members in (team, Team(1), team, team):
        with pytest.raises(MemoryError):
            write_and_attend(members.mailbox, table, query, key, key, np.float32(1), np.ones((2, 32), np.float32))
        assert members.mailbox[OWNER] == 0


def test_a_closed_team_has_no_threads_and_work_is_still_done(checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("llama"))
    team = Eager(3)
    stage = with_team(team, lambda: CompiledStage.load(checkpoint, LayerRange(0, 4), "float32", 8))
    helpers = list(team._helpers)
    wanted = run(stage, [20])
    team.close()
    assert len(helpers) == 2 and not any(helper.is_alive() for helper in helpers)
    assert torch.equal(run(stage, [20]), wanted) and team.num_called == 0
