"""What a worker is told is held against its stage and the request before memory is asked for."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from flowspec.core import FINAL, MAX_ROWS, MAX_RUNNING
from flowspec.errors import ProtocolError
from flowspec.model.slots import INITIAL_CAPACITY
from flowspec.model.synthetic import SyntheticStage
from flowspec.wire.messages import (
    PROTOCOL_VERSION,
    Commit,
    Configure,
    Failed,
    Open,
    Reserve,
    Segment,
    Step,
    Timing,
)
from flowspec.worker.actor import Worker
from flowspec.worker.checks import Limits, check_configure

LIMITS = Limits(vocab_size=96, num_positions=256)
OPEN = Open(0, 0, 0, [FINAL], slot_limit=100)
ROOT = Segment(0, 0, 0, [0], [-1], [0], 0, [7], None, [])
CHILD = Segment(0, 0, 1, [4, 6], [0, 4], [1, 2], 0, [7, 8], None, [])
FEATURES = torch.zeros(2, SyntheticStage.hidden_size, dtype=torch.int64)
PASSED_ON = replace(CHILD, token_ids=None, hidden=FEATURES, timings=[Timing(1, 2, 0.1, 0.2, 9, 2)])


def chain(num_rows: int, num_prefix: int = 0, first: int = 1) -> Segment:
    ids = list(range(first, first + num_rows))
    return Segment(0, 0, 9, ids, [i - 1 for i in ids], ids, num_prefix, [7] * num_rows, None, [])


def worker_with_root(index: int = 1) -> Worker:
    is_first = index == 1
    worker = Worker(SyntheticStage(is_first, is_last=not is_first), index, lambda: 0.0, limits=LIMITS)
    root = ROOT if is_first else replace(PASSED_ON, segment_id=0, node_ids=[0], parent_ids=[-1], positions=[0],
                                         hidden=FEATURES[:1])  # fmt: skip
    assert not failures(worker, OPEN, root)
    return worker


def failures(worker: Worker, *messages: Any) -> list[str]:
    sends = [send for message in messages for send in worker.on_message(message)]
    while (more := worker.on_idle()) is not None:
        sends += more
    return [send.message.text for send in sends if isinstance(send.message, Failed)]


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "token beyond the vocabulary": (replace(CHILD, token_ids=[7, 96]), "no token 96"),
    "negative token": (replace(CHILD, token_ids=[7, -1]), "no token -1"),
    "position of 2^63": (replace(CHILD, positions=[1, 2**63]), "no position"),
    "negative position": (replace(CHILD, positions=[-1, 0]), "no position -1"),
    "position behind another": (replace(CHILD, positions=[1, 5]), "stands at position 5"),
    "position far from the parent's": (replace(CHILD, positions=[3, 4]), "stands at position 3"),
    "node id of 2^63": (replace(CHILD, node_ids=[4, 2**63]), "no node id"),
    "parent id of -9": (replace(CHILD, parent_ids=[-9, 4]), "no parent id -9"),
    "segment id of -1": (replace(CHILD, segment_id=-1), "no segment"),
    "gate of 2^63": (replace(CHILD, gate=2**63), "no step"),
    "timings of a stage behind": (replace(CHILD, timings=PASSED_ON.timings), "timings"),
    "hidden states on the first stage": (PASSED_ON, "timings|token ids"),
    "a chain of 40,000 rows": (chain(40_000), "40000 rows"),
    "a prompt with a hole": (replace(chain(2, 2), positions=[1, 3]), "do not follow"),
    "2^40 slots": (Reserve(0, 0, 2**40), "no text needs more"),
    "an open of 2^40 slots": (Open(1, 0, 0, [FINAL], slot_limit=2**40), "no text needs more"),
    "an open of negative slots": (Open(1, 0, 0, [FINAL], slot_limit=-1), "no text needs more"),
    "an open of no cache": (Open(1, 0, 0, [FINAL], cached_by=7), "not kept"),
    "an open of a negative cache": (Open(1, 0, 0, [FINAL], cached_by=7, num_cached=-5), "-5 tokens"),
    "an open of unknown layers": (Open(1, 0, 0, [5]), "outputs of layers"),
    "the same open twice": (OPEN, "open already"),
    "an epoch of -1": (Open(1, -1, 0, [FINAL]), "no epoch"),
    "a commit of nothing": (Commit(0, 0, [], 4), "commit of 0"),
    "a commit of an unknown node": (Commit(0, 0, [5], 9), "unknown"),
    "a step of 2^63": (Step(0, 0, 2**63), "no step"),
}


@pytest.mark.parametrize(("message", "told"), BAD_MESSAGES.values(), ids=list(BAD_MESSAGES))
def test_what_breaks_the_protocol_ends_its_request_alone(message: Any, told: str) -> None:
    worker = worker_with_root()
    other = worker.on_message(Open(5, 0, 0, [FINAL]))
    (text,) = failures(worker, message)
    assert re.search(told, text), text
    assert not other and not failures(worker, replace(ROOT, request_id=5), replace(CHILD, request_id=5))


BAD_HIDDEN = {
    "another width": torch.zeros(2, 5, dtype=torch.int64),
    "one row too many dimensions": torch.zeros(2, 4, 1, dtype=torch.int64),
    "another type": torch.zeros(2, 4),
}


@pytest.mark.parametrize("hidden", BAD_HIDDEN.values(), ids=list(BAD_HIDDEN))
def test_hidden_states_that_are_not_the_stages_are_refused(hidden: torch.Tensor) -> None:
    (text,) = failures(worker_with_root(2), replace(PASSED_ON, hidden=hidden))
    assert "hidden states are" in text
    assert not failures(worker_with_root(2), PASSED_ON)


def test_what_is_refused_takes_no_memory() -> None:
    worker = worker_with_root()
    assert failures(worker, chain(40_000), chain(300, 300), replace(CHILD, token_ids=[1, 2**40]))
    tables = [request.cache.slots for request in worker._requests._open.values()]
    assert [(table.capacity, table.num_used) for table in tables] == [(INITIAL_CAPACITY, 1)]


def test_a_request_holds_no_more_than_a_text_has_use_for() -> None:
    """Its rows come in segments that are each of a fair length."""
    worker = worker_with_root()
    most = LIMITS.num_slots // MAX_ROWS + 2
    told = [text for number in range(most) for text in failures(worker, chain(MAX_ROWS, 0, 1 + number * MAX_ROWS))]
    assert any(f"more than {MAX_ROWS} nodes" in text or "slots of a text" in text for text in told)
    assert worker._requests._open[0].cache.slots.num_used <= LIMITS.num_slots


def test_so_many_requests_may_be_open_and_no_more() -> None:
    worker = Worker(SyntheticStage(True, False), 1, lambda: 0.0, limits=LIMITS)
    told = failures(worker, *(Open(number, 0, 0, []) for number in range(MAX_RUNNING)))
    assert not told and worker.num_open == MAX_RUNNING
    (text,) = failures(worker, Open(MAX_RUNNING, 0, 0, []))
    assert "open already" in text


CONFIGURE = Configure(PROTOCOL_VERSION, 1, "demo", 0, 2, "float32", "10.0.0.2:7070", 2.0)
HERE = "tcp://10.0.0.1:7070"
BAD_CONFIGURES: dict[str, dict[str, Any]] = {
    "no heartbeat": {"heartbeat_s": 0.0},
    "a heartbeat that is no number": {"heartbeat_s": math.nan},
    "an endless heartbeat": {"heartbeat_s": math.inf},
    "stage -5": {"stage": -5},
    "stage 2 with the first layer": {"stage": 2},
    "layers that end before they begin": {"start_layer": 2},
    "negative layers": {"start_layer": -2},
    "a name with a line break": {"model": "demo\n"},
    "no name": {"model": ""},
    "a very long name": {"hints": "x" * 10_000},
    "its own address": {"next_address": "10.0.0.1:7070"},
    "an address without a port": {"next_address": "10.0.0.2"},
    "port 0": {"next_address": "10.0.0.2:0"},
    "port 99999": {"next_address": "tcp://10.0.0.2:99999"},
    "another socket of this machine": {"next_address": "ipc:///run/other"},
    "a way through another card": {"next_address": "tcp://eth0;10.0.0.2:7070"},
    "another kind of address": {"next_address": "inproc://here"},
    "a draft model that is one stage of two": {"num_best": 5},
    "a draft model of layers behind others": {"num_best": 5, "next_address": None, "stage": 2, "start_layer": 1},
    "too many guesses": {"num_best": 5000, "next_address": None},
    "fewer guesses than none": {"num_best": -1, "next_address": None},
    "an address with a line break": {"next_address": "10.0.0.2\n:7070"},
}


@pytest.mark.parametrize("fields", BAD_CONFIGURES.values(), ids=list(BAD_CONFIGURES))
def test_odd_configures_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        check_configure(replace(CONFIGURE, **fields), HERE)


@pytest.mark.parametrize(
    ("address", "here"),
    [("10.0.0.2:7070", HERE), ("[fe80::1]:7070", HERE), ("jetson-2.local:7070", HERE), (None, HERE),
     ("ipc:///tmp/flowspec-x/2", "ipc:///tmp/flowspec-x/1")],
)  # fmt: skip
def test_fair_configures_are_taken(address: str | None, here: str) -> None:
    check_configure(replace(CONFIGURE, next_address=address), here)
    check_configure(replace(CONFIGURE, next_address=None, num_best=256), here)
