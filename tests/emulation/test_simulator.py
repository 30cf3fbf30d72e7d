"""The simulator: faults cost time and never change a token, and times that a hand can compute come out so."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowspec.bench.prompts import BUILT_IN_PROMPTS
from flowspec.config import FlowParts, ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.draft.synthetic import SyntheticSource
from flowspec.emulation.checkpoint_pair import CheckpointPair
from flowspec.emulation.costs import LinkModel
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Experiment, Faults, Slowdown
from flowspec.emulation.pairs import PROMPT_LEN, ModelPair, SyntheticPair
from flowspec.emulation.simulator import simulate
from flowspec.emulation.start_up import StartUp
from flowspec.emulation.virtual_time import VirtualLink
from flowspec.errors import UsageError
from flowspec.model.synthetic import VOCAB_SIZE, Language, quality
from flowspec.request.records import RequestRecord, Span
from flowspec.schedule.catalogue import ABLATIONS, AUTO, SCHEDULES
from tapped import in_turn

NANO_FILE = Path(__file__).parents[2] / "clusters" / "7b-nano-150m.toml"
NANO = ClusterDescription.load(NANO_FILE)
PAIR = SyntheticPair("eagle1")
BLOCK_PAIR = SyntheticPair("block")
ALL = (AUTO, *SCHEDULES, *ABLATIONS, "tp-megatron")
PROMPT = "a prompt"
NO_FAULTS = Faults()
GREEDY = SamplingParams(max_tokens=20)

# A layer takes 10 ms however many rows it computes, links cost nothing that could be seen, and the driver's work takes
# round numbers of ms.
FLAT = """
[model]
name = "flat"
num_layers = 8
hidden_size = 1000
vocab_size = 100
layer_params = 1000
kv_size = 1

[device.box]
memory_gb_s = 1000.0
compute_tflops = 1000.0
overhead_ms = 7.0
forward_ms = [[1, 10.0], [1000, 10.0]]

[link.free]
latency_ms = 0.0
bandwidth_mbps = 1e15

[pipeline]
devices = ["box", "box", "box", "box"]
links = "free"
partition = "0:1,1:3,3:6,6:8"

[driver.published]
draft_pass_ms = 3.0
lm_head_ms = 2.0
verify_ms = 1.0
send_ms = 0.5

[driver.ours]
draft_pass_ms = 3.0
lm_head_ms = 2.0
verify_ms = 1.0
send_ms = 0.5
"""
FLAT_CLUSTER = ClusterDescription.parse(FLAT, "flat.toml")
AR_DRIVER_S = 3.5e-3  # lm_head, verify, send: what the driver spends on a token of ``ar`` there


def run(
    schedule: str,
    cluster: ClusterDescription = NANO,
    params: SamplingParams = GREEDY,
    faults: Faults = NO_FAULTS,
    pair: ModelPair = PAIR,
    prompt: str = PROMPT,
) -> RequestRecord:
    experiment = Experiment(cluster, ScheduleConfig(), params, faults=faults, with_spans=True)
    return simulate(experiment, pair, schedule, [(0, prompt)])[0]


@functools.cache
def plain_tokens(params: SamplingParams, prompt: str = PROMPT, pair: ModelPair = PAIR) -> tuple[int, ...]:
    """Of ``ar`` where nothing is wrong."""
    return tuple(run("ar", params=params, pair=pair, prompt=prompt).token_ids)


def params_of(temperature: float, num_tokens: int = 20) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=11 if temperature else None)


def with_links(cluster: ClusterDescription, **changes: float) -> ClusterDescription:
    links = tuple(replace(link, **changes) for link in cluster.links)
    return replace(cluster, links=links, control=replace(cluster.control, **changes))


# --- faults ---


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ALL)
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    max_delay_ms=st.sampled_from([0.0, 30.0, 500.0, 5000.0]),
    slow_worker=st.integers(1, 4),
    slow_from_s=st.floats(0.0, 6.0),
    jitter_ms=st.sampled_from([0.0, 20.0, 400.0]),
    loss=st.sampled_from([0.0, 0.02]),
    num_stages=st.sampled_from([1, 2, 4, 5]),
    prompt=st.sampled_from(["a", "b", "c"]),
)
@example(1, 5000.0, 2, 1.0, 400.0, 0.02, 4, "a")
def test_no_delay_no_slow_worker_and_no_bad_link_changes_a_token(
    schedule: str,
    temperature: float,
    seed: int,
    max_delay_ms: float,
    slow_worker: int,
    slow_from_s: float,
    jitter_ms: float,
    loss: float,
    num_stages: int,
    prompt: str,
) -> None:
    params = params_of(temperature)
    cluster = with_links(NANO, jitter_ms=jitter_ms, loss=loss).with_stages(num_stages)
    faults = Faults(max_delay_ms, Slowdown(slow_worker, slow_from_s, 2.0), seed)
    plain = plain_tokens(params, prompt)
    assert len(plain) == params.max_tokens
    assert tuple(run(schedule, cluster, params, faults, prompt=prompt).token_ids) == plain


@pytest.mark.parametrize(
    ("schedule", "temperature"),
    [(name, float(i % 2)) for i, name in enumerate(name for name in ALL if name != "ar")],
)
def test_a_block_draft_changes_no_token(schedule: str, temperature: float) -> None:
    params = params_of(temperature, num_tokens=30)  # more than a block
    tokens = run(schedule, params=params, pair=BLOCK_PAIR).token_ids
    assert tuple(tokens) == plain_tokens(params, pair=BLOCK_PAIR)


@pytest.mark.parametrize(("schedule", "num_stages", "temperature"), in_turn(ALL, (1, 2, 5), (0.0, 1.0)))
def test_any_number_of_stages_gives_the_same_tokens(schedule: str, num_stages: int, temperature: float) -> None:
    params = params_of(temperature, 30)
    tokens = run(schedule, NANO.with_stages(num_stages), params).token_ids
    assert tuple(tokens) == plain_tokens(params)


@pytest.mark.parametrize("schedule", ["flow", "lockstep"])
def test_a_real_model_gives_the_same_tokens_under_faults(schedule: str) -> None:
    pair, params, cluster = CheckpointPair("demo", "auto"), SamplingParams(max_tokens=12), NANO.with_stages(2)
    faults = Faults(2000.0, Slowdown(2, 0.5, 2.0), seed=3)
    plain = run("ar", cluster, params, pair=pair, prompt="Once upon a time")
    late = run(schedule, cluster, params, faults, pair, "Once upon a time")
    assert late.token_ids == plain.token_ids and late.accepted > 0


@pytest.mark.parametrize("schedule", ["ar", "lockstep", "flow"])
def test_the_same_seed_gives_the_same_digits_and_another_seed_other_times(schedule: str) -> None:
    first, again, other = (run(schedule, faults=Faults(800.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert other.end_s != first.end_s and other.token_ids == first.token_ids


def test_a_slowdown_counts_from_its_moment_on() -> None:
    plain = run("ar")
    late = run("ar", faults=Faults(slowdown=Slowdown(2, plain.end_s + 1, 2.0)))
    assert late == plain
    slow = run("ar", faults=Faults(slowdown=Slowdown(2, 2.0, 2.0)))
    for before, after in zip(forwards(plain, 2), forwards(slow, 2), strict=True):
        cost_s = (before.end_s - before.start_s) * (2 if after.start_s >= 2.0 else 1)
        assert after.end_s - after.start_s == pytest.approx(cost_s)
    assert forwards(slow, 3)[-1].end_s > forwards(plain, 3)[-1].end_s + 0.5


# --- time by hand ---


def forwards(record: RequestRecord, place: int) -> list[Span]:
    return [span for span in record.spans if span.place == place]


def ar_token_s(cluster: ClusterDescription) -> float:
    """What a token of ``ar`` takes, measured."""
    record = run("ar", cluster)
    assert record.emissions.num_first == 1 and record.num_decoded == GREEDY.max_tokens - 1
    return record.decode_s / record.num_decoded


def test_a_token_of_ar_takes_all_stages_and_the_drivers_work() -> None:
    assert ar_token_s(FLAT_CLUSTER) == pytest.approx((1 + 2 + 3 + 2) * 0.010 + AR_DRIVER_S, rel=1e-4)


def test_a_measured_table_holds_a_forwards_fixed_cost_and_a_roofline_adds_it() -> None:
    box = replace(FLAT_CLUSTER.devices[0], forward_ms=(), layer_overhead_ms=10.0)
    cluster = replace(FLAT_CLUSTER, devices=(box,) * 4)
    assert ar_token_s(cluster) == pytest.approx(8 * 0.010 + 4 * 0.007 + AR_DRIVER_S, rel=1e-4)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_latency_costs_ar_one_way_for_every_hop(num_stages: int) -> None:
    cluster = FLAT_CLUSTER.with_stages(num_stages)
    added = ar_token_s(with_links(cluster, latency_ms=50.0)) - ar_token_s(cluster)
    assert added == pytest.approx((num_stages + 1) * 0.050, rel=1e-4)


def test_what_the_engine_adds_to_a_hop_costs_as_latency_does() -> None:
    cluster = replace(FLAT_CLUSTER, ours=replace(FLAT_CLUSTER.ours, hop_ms=6.0))
    assert ar_token_s(cluster) - ar_token_s(FLAT_CLUSTER) == pytest.approx(5 * 0.006, rel=1e-4)


def test_a_device_at_half_speed_slows_ar_by_its_share() -> None:
    box = FLAT_CLUSTER.devices[2]
    slow = replace(box, forward_ms=tuple((rows, 2 * ms) for rows, ms in box.forward_ms))
    cluster = replace(FLAT_CLUSTER, devices=(box, box, slow, box))
    assert ar_token_s(cluster) - ar_token_s(FLAT_CLUSTER) == pytest.approx(3 * 0.010, rel=1e-4)


def test_half_the_bandwidth_doubles_the_transfers_and_nothing_else() -> None:
    fast, half = (run("ar", with_links(FLAT_CLUSTER, bandwidth_mbps=mbps)) for mbps in (1.0, 0.5))
    assert half.token_ids == fast.token_ids and half.link_bytes == fast.link_bytes
    base_s, fast_s, half_s = (record.decode_s / record.num_decoded for record in (run("ar", FLAT_CLUSTER), fast, half))
    assert half_s - base_s == pytest.approx(2 * (fast_s - base_s), rel=0.02)
    # A row is 2000 bytes, which take 16 ms at 1 Mbps; four of the five hops carry one, and headers are small.
    assert 4 * 0.016 < fast_s - base_s < 4 * 0.016 + 5 * 8 * 150 / 1e6


@pytest.mark.parametrize("schedule", ["serial", "chunked"])
def test_a_tree_of_serial_takes_its_passes_its_way_and_its_verification(schedule: str) -> None:
    record = run(schedule, FLAT_CLUSTER, SamplingParams(max_tokens=60))
    work = [span for span in record.spans if span.place == 0 and span.start_s >= record.emissions.decode_start_s]
    driver_s = {kind: sum(s.end_s - s.start_s for s in work if s.work == kind) for kind in {s.work for s in work}}
    num_trees = sum(span.work == "verify" for span in work)
    # The last tree may be a root alone: one chunk.
    assert num_trees == -(-record.segments // {"serial": 1, "chunked": 5}[schedule])
    assert record.draft_passes > num_trees
    assert driver_s["draft pass"] == pytest.approx(record.draft_passes * 0.003)
    assert driver_s["send"] == pytest.approx(record.segments * 0.0005)
    # A tree's chunks leave together when the last is ready; its first one passes 8 layers, the others follow at the
    # pace of the slowest stage, 30 ms.
    way_s = record.segments * 0.0005 + num_trees * 8 * 0.010 + (record.segments - num_trees) * 0.030
    expected_s = record.draft_passes * 0.003 + way_s + num_trees * (0.002 + 0.001)
    assert record.decode_s == pytest.approx(expected_s, rel=1e-3)


def test_a_block_takes_one_pass_a_tree_and_each_level_of_it_is_read() -> None:
    costs = {"block_pass_ms": 9.0, "grow_ms": 0.25}
    cluster = replace(FLAT_CLUSTER, ours=replace(FLAT_CLUSTER.ours, **costs))
    record = run("serial", cluster, SamplingParams(max_tokens=60), pair=BLOCK_PAIR)
    work = [span for span in record.spans if span.place == 0 and span.start_s >= record.emissions.decode_start_s]
    num_trees = sum(span.work == "verify" for span in work)
    assert record.draft_passes == sum(span.work == "draft pass" for span in work)
    assert num_trees - 1 <= record.draft_passes <= num_trees  # the last tree may be a root alone
    grown = [span for span in work if span.work == "growing"]
    assert num_trees < len(grown) <= 5 * num_trees  # six levels, the first by the pass
    assert sum(s.end_s - s.start_s for s in grown) == pytest.approx(len(grown) * 0.25e-3)
    assert sum(s.end_s - s.start_s for s in work if s.work == "draft pass") == pytest.approx(record.draft_passes * 9e-3)


def test_flow_sends_a_root_that_nobody_foresaw_with_guesses_of_the_last_block_before_the_next_pass() -> None:
    record = run("flow", params=SamplingParams(max_tokens=120), pair=BLOCK_PAIR)
    work = [span.work for span in record.spans if span.place == 0 and span.work not in ("lm_head", "hint")]
    after = Counter(tuple(kinds) for kinds in zip(work, work[1:], work[2:], strict=False) if kinds[0] == "verify")
    assert record.restarts > 3
    reread = sum(num for kinds, num in after.items() if kinds[1] == "growing")
    assert reread >= record.restarts - 2  # the first root has no block before it, and a used-up block says nothing
    passes = [i for i, kind in enumerate(work) if kind == "growing" and work[i - 1] == "verify"]
    first_later = [next(kind for kind in work[i:] if kind != "growing") for i in passes]
    assert set(first_later) <= {"send", "verify"}


def test_pipedec_takes_another_block_where_its_levels_go_beyond_the_first() -> None:
    cluster = ClusterDescription.load(NANO_FILE.with_name("7b-agx-16.toml"))
    record = run("pipedec", cluster, SamplingParams(max_tokens=60), pair=BLOCK_PAIR)
    assert record.draft_passes > record.restarts + 10  # 17 levels under way, and 15 in a block


# --- what was spent on what ---


@pytest.mark.parametrize("schedule", ALL)
def test_a_place_does_one_thing_at_a_time(schedule: str) -> None:
    record = run(schedule, faults=Faults(700.0, seed=5))
    for place in range(len(record.busy_s)):
        spans = forwards(record, place)
        assert spans and all(span.start_s <= span.end_s for span in spans)
        assert all(left.end_s <= right.start_s for left, right in pairwise(spans)), "in order, without overlap"
        assert 0.0 <= record.busy_s[place] <= record.decode_s * (1 + 1e-12)
    for span in record.spans:
        if span.place:
            assert span.work in ("forward", "cancelled forward", "hint") and span.num_rows > 0
            assert (span.segment_id >= 0) == (span.work == "forward")
        else:
            assert span.work in ("draft pass", "merging draft pass", "hint", "lm_head", "verify", "send")


@pytest.mark.parametrize("schedule", [*SCHEDULES, *ABLATIONS])
def test_a_segment_is_computed_after_it_was_sent_and_stage_by_stage(schedule: str) -> None:
    record = run(schedule, faults=Faults(700.0, seed=6))
    finished = [span for span in record.spans if span.work == "forward"]
    starts = {(span.place, span.segment_id): span for span in finished}
    assert len(starts) == len(finished), "no stage computes a segment twice"
    for segment in record.segment_records:
        on_way = [starts[place, segment.segment_id] for place in range(1, 5) if (place, segment.segment_id) in starts]
        assert all(left.end_s < right.start_s for left, right in pairwise(on_way))
        assert all(left.num_rows >= right.num_rows for left, right in pairwise(on_way))
        if on_way:
            assert on_way[0].start_s > segment.sent_s and on_way[0].num_rows <= segment.num_sent
        assert segment.num_accepted <= segment.num_verified <= segment.num_sent


@pytest.mark.parametrize("schedule", ALL)
def test_counts_add_up(schedule: str) -> None:
    record = run(schedule)
    assert record.rows == sum(segment.num_sent for segment in record.segment_records)
    assert record.segments == len(record.segment_records)
    assert record.accepted <= record.drafted <= record.rows
    assert len(record.token_ids) == GREEDY.max_tokens
    assert sum(segment.num_accepted for segment in record.segment_records) <= len(record.token_ids)


def test_link_bytes_of_ar_are_its_hidden_states_and_small_headers() -> None:
    record = run("ar", FLAT_CLUSTER)
    # Every row of prompt and text leaves each of the four stages once, as 1000 numbers of two bytes; the last root
    # is never sent. Each hop has a header, and each token two to four control messages.
    num_rows = PROMPT_LEN + GREEDY.max_tokens - 1
    payload = num_rows * 1000 * 2 * 4
    prompt_rows = PROMPT_LEN - 1  # ``ar`` wants no features: their states stop at the last stage
    payload -= prompt_rows * 1000 * 2
    assert 0 < record.link_bytes - payload < 6 * 1500 + GREEDY.max_tokens * (5 * 150 + 4 * 60)


@pytest.mark.parametrize("prompt", ["a", "b", "c"])
def test_flow_sends_when_worker_1_is_about_to_be_free(prompt: str) -> None:
    """Late binding: with costs that never vary, at most one segment waits there, so no decision is made early."""
    even = replace(FLAT_CLUSTER, partition=FLAT_CLUSTER.with_stages(4).partition)
    record = run("flow", even, SamplingParams(max_tokens=60), prompt=prompt)
    begins = {span.segment_id: span.start_s for span in forwards(record, 1)}
    # One that died while it waited was never computed.
    computed = [segment for segment in record.segment_records if segment.segment_id in begins]
    for segment in computed:
        waiting = [s for s in computed if s.sent_s <= segment.sent_s < begins[s.segment_id]]
        assert len(waiting) <= 1


# --- links ---


NUM_BYTES = 100  # of a message


def make_link(latency_s: float = 0.01, seed: int = 0, max_delay_s: float = 0.0, **changes: float) -> VirtualLink:
    model = LinkModel("link", latency_ms=0.0, bandwidth_mbps=changes.pop("bandwidth_mbps", 100.0), **changes)
    return VirtualLink(model, latency_s, Random(seed), max_delay_s)


@given(seed=st.integers(0, 2**32), gaps=st.lists(st.floats(0, 0.3), min_size=2, max_size=40))
def test_messages_keep_their_order_whatever_the_link_does(seed: int, gaps: list[float]) -> None:
    link = make_link(seed=seed, max_delay_s=2.0, jitter_ms=300.0, loss=0.1, retransmit_ms=500.0)
    now, arrivals = 0.0, [0.0]
    for gap in gaps:
        now += gap
        arrivals.append(link.arrival_s(now, NUM_BYTES))
        assert arrivals[-1] >= now + 0.01
    assert all(left <= right for left, right in pairwise(arrivals))


def test_messages_on_one_link_take_turns() -> None:
    link = make_link(bandwidth_mbps=0.001)  # 8 s for 1000 bytes
    arrivals = [link.arrival_s(0.0, NUM_BYTES) for _ in range(4)]
    transfer_s = NUM_BYTES * 8 / 1000
    assert link.num_bytes == 4 * NUM_BYTES
    assert arrivals == pytest.approx([0.01 + i * transfer_s for i in range(1, 5)])
    assert link.arrival_s(1e6, NUM_BYTES) == pytest.approx(1e6 + 0.01 + transfer_s)


def test_jitter_delays_by_up_to_its_bound() -> None:
    plain, link = make_link(), make_link(jitter_ms=100.0)
    delays = [link.arrival_s(i, NUM_BYTES) - plain.arrival_s(i, NUM_BYTES) for i in range(500)]
    assert all(-1e-9 <= delay <= 0.1 for delay in delays)
    assert sum(delays) / 500 == pytest.approx(0.05, abs=0.01)


def test_a_lost_packet_costs_a_retransmission() -> None:
    plain, link = make_link(), make_link(loss=0.25, retransmit_ms=200.0)
    delays = [round(link.arrival_s(i, NUM_BYTES) - plain.arrival_s(i, NUM_BYTES), 6) for i in range(1000)]
    assert set(delays) == {0.0, 0.2}
    assert delays.count(0.2) / 1000 == pytest.approx(0.25, abs=0.06)
    slow, good = (run("ar", with_links(NANO, loss=loss)) for loss in (0.02, 0.0))
    assert slow.end_s > good.end_s + 0.2 and slow.token_ids == good.token_ids


def test_an_int8_draft_needs_its_cost_and_only_our_driver_has_one() -> None:
    with pytest.raises(UsageError, match=r"cluster file flat has no int8_draft_pass_ms in \[driver.ours\]"):
        Experiment(FLAT_CLUSTER, ScheduleConfig(), GREEDY, int8_draft=True)
    experiment = Experiment(NANO, ScheduleConfig(), GREEDY, as_published=True, int8_draft=True)
    assert experiment.costs_of("flow").draft_pass_ms == NANO.ours.int8_draft_pass_ms
    assert experiment.costs_of("lockstep") == NANO.published


@pytest.mark.parametrize(("int8_draft", "key"), [(False, "block_pass_ms"), (True, "int8_block_pass_ms")])
def test_a_block_draft_needs_its_cost(int8_draft: bool, key: str) -> None:
    cluster = replace(FLAT_CLUSTER, ours=replace(FLAT_CLUSTER.ours, int8_draft_pass_ms=1.0))
    experiment = Experiment(cluster, ScheduleConfig(), GREEDY, int8_draft=int8_draft)
    with pytest.raises(UsageError, match=rf"cluster file flat has no {key} for each driver; add it"):
        simulate(experiment, BLOCK_PAIR, "flow", [(0, PROMPT)])
    with_cost = replace(cluster, ours=replace(cluster.ours, block_pass_ms=2.0, int8_block_pass_ms=1.0))
    assert simulate(replace(experiment, cluster=with_cost), BLOCK_PAIR, "flow", [(0, PROMPT)])[0].draft_passes


def test_a_draft_that_knows_the_noise_is_accepted_more_often_and_changes_no_token() -> None:
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=1)
    experiment = Experiment(NANO, ScheduleConfig(), params)
    prompts = list(enumerate(BUILT_IN_PROMPTS[:2]))
    coupled, plain = (
        simulate(experiment, CheckpointPair("demo", "auto", is_coupled), "serial", prompts)
        for is_coupled in (True, False)
    )
    assert [r.token_ids for r in coupled] == [r.token_ids for r in plain]
    assert sum(r.accepted for r in coupled) > 1.1 * sum(r.accepted for r in plain)
    assert sum(r.segments for r in coupled) < sum(r.segments for r in plain)


def test_ngrams_save_time_where_text_repeats_itself_and_change_no_token() -> None:
    experiment = Experiment(NANO, ScheduleConfig(), SamplingParams(max_tokens=40), start_up=StartUp(error=0.0))
    pair, prompts = CheckpointPair("demo", "auto"), list(enumerate(BUILT_IN_PROMPTS[:2]))
    without, with_ngrams = (simulate(experiment, pair, name, prompts) for name in ("flow-no-ngrams", "flow"))
    assert [record.token_ids for record in with_ngrams] == [record.token_ids for record in without]
    assert sum(record.decode_s for record in with_ngrams) < sum(record.decode_s for record in without)


@pytest.mark.parametrize(("name", "is_cheap"), [("7b-nano-150m", True), ("7b-int4-nano-150m", False)])
def test_workers_stop_hinting_where_a_hint_takes_long(name: str, is_cheap: bool) -> None:
    cluster = ClusterDescription.load(Path(__file__).parents[2] / "clusters" / f"{name}.toml")
    experiment = Experiment(cluster, ScheduleConfig(), SamplingParams(max_tokens=40), with_spans=True)
    (record,) = simulate(experiment, PAIR, "flow", [(0, PROMPT)])
    num_hints = sum(span.work == "hint" for span in record.spans if span.place == 3)
    assert num_hints > 10 if is_cheap else num_hints == 3


# --- the schedule that chooses ---


class Misled(Language):
    """A draft of it is always wrong."""

    def draft(
        self,
        contexts: NDArray[np.int64],
        staleness: NDArray[np.int64],
        top_k: int,
        detours: NDArray[np.int64] | int = 0,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        token_ids, logprobs = super().draft(contexts, staleness, top_k, detours)
        truths = self.target_logits(contexts).argmax(axis=1)
        token_ids[token_ids == truths[:, None]] = VOCAB_SIZE  # a token that is never drawn
        return token_ids, logprobs


def test_auto_is_flow_where_that_is_faster() -> None:
    flow, auto = run("flow"), run("auto")
    assert auto.token_ids == flow.token_ids and auto.end_s == flow.end_s


def test_auto_gives_a_useless_draft_up() -> None:
    pair = SyntheticPair("eagle1")
    pair.source = SyntheticSource(Misled(quality("eagle1")))
    experiment = Experiment(NANO, ScheduleConfig(flow_parts=FlowParts(hints=False)), SamplingParams(200, seed=0))
    plain, flow, auto = (simulate(experiment, pair, name, [(0, "x")])[0] for name in ("ar", "flow", "auto"))
    assert plain.token_ids == flow.token_ids == auto.token_ids
    assert flow.decode_s > 1.03 * plain.decode_s, "the case did not occur"
    assert auto.decode_s < 1.05 * plain.decode_s
    assert auto.draft_passes < 0.5 * flow.draft_passes
