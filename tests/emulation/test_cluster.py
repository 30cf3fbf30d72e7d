from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.core import Partition
from flowspec.emulation.costs import Device, DriverCosts, EmulatedModel, LinkModel, TensorParallel
from flowspec.emulation.description import ClusterDescription
from flowspec.errors import UsageError

CLUSTERS = Path(__file__).parents[2] / "clusters"
FILES = sorted(CLUSTERS.glob("*.toml"))

MODEL = EmulatedModel("small", num_layers=8, hidden_size=64, vocab_size=100, layer_params=1e6, kv_size=128)
DEVICE = Device("d", memory_gb_s=10.0, compute_tflops=1.0, overhead_ms=2.0, layer_overhead_ms=0.5)
LINK = LinkModel("l", latency_ms=1.0, bandwidth_mbps=100.0)
COSTS = DriverCosts(draft_pass_ms=1.0, lm_head_ms=1.0, verify_ms=1.0)

# Line numbers in the tests below count from the comment in the first line.
GOOD = """\
# a cluster
[model]
name = "small"
num_layers = 8
hidden_size = 64
vocab_size = 100
layer_params = 1e6
kv_size = 128

[device.d]
memory_gb_s = 10
compute_tflops = 1.0
forward_ms = [
  [1, 2.0],
  [16, 2.5],
]

[link.lan]
latency_ms = 0.3
bandwidth_mbps = 150

[pipeline]
devices = ["d", "d"]
links = "lan"

[driver.published]
draft_pass_ms = 1
lm_head_ms = 1
verify_ms = 1

[driver.ours]
draft_pass_ms = 1
lm_head_ms = 1
verify_ms = 1
"""


def spec(num_stages: int = 4) -> ClusterDescription:
    return ClusterDescription(
        name="small",
        model=MODEL,
        devices=(DEVICE,) * num_stages,
        links=(LINK,) * (num_stages + 1),
        control=LINK,
        partition=Partition.even(MODEL.num_layers, num_stages),
        published=COSTS,
        ours=COSTS,
        tensor_parallel=TensorParallel(collective_overhead_ms=3.0),
    )


def shipped(name: str) -> ClusterDescription:
    return ClusterDescription.load(CLUSTERS / f"{name}.toml")


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_shipped_file_loads_and_its_partition_tiles_the_model(path: Path) -> None:
    cluster = ClusterDescription.load(path)
    assert cluster.name == path.stem
    assert cluster.partition.num_layers == cluster.model.num_layers
    assert len(cluster.partition) == cluster.num_stages == len(cluster.links) - 1
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_an_int8_draft_pass_saves_half_of_the_reading_and_no_python(path: Path) -> None:
    ours, devices = ClusterDescription.load(path).ours, ClusterDescription.load(path).devices
    python_ms = 0.6 if devices[0].memory_gb_s == 49 else 0.3
    assert ours.int8_draft_pass_ms - python_ms == pytest.approx((ours.draft_pass_ms - python_ms) / 2, abs=0.051)
    assert ours.block_pass_ms is not None
    assert ours.int8_block_pass_ms - python_ms == pytest.approx((ours.block_pass_ms - python_ms) / 2, abs=0.051)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_block_pass_reads_five_layers_a_matrix_and_the_lm_head(path: Path) -> None:
    cluster = ClusterDescription.load(path)
    model, ours, published = cluster.model, cluster.ours, cluster.published
    gb_s = 49.0 if "nano" in path.stem else 150.0
    layers, first = 5 * model.layer_params, 5 * model.hidden_size**2
    lm_head, one = model.vocab_size * model.hidden_size, model.layer_params + 2 * model.hidden_size**2
    block_ms, one_ms = (2e-6 * params / gb_s for params in (layers + first + lm_head, one + lm_head))
    assert ours.block_pass_ms is not None and published.block_pass_ms is not None
    assert ours.block_pass_ms - ours.draft_pass_ms == pytest.approx(block_ms - one_ms, abs=0.11)
    assert published.block_pass_ms / published.draft_pass_ms == pytest.approx(block_ms / one_ms, rel=0.12)
    assert ours.grow_ms < published.grow_ms < ours.draft_pass_ms / 4


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_language_model_pass_reads_half_a_billion_weights(path: Path) -> None:
    cluster = ClusterDescription.load(path)
    ours, published = cluster.ours, cluster.published
    gb_s, launch_ms, python_ms = (49.0, 0.5, 0.6) if "nano" in path.stem else (150.0, 0.25, 0.3)
    read_ms = 2 * 0.494e3 / gb_s
    assert ours.model_pass_ms is not None and published.model_pass_ms is not None
    assert ours.model_pass_ms == pytest.approx(read_ms + 24 * launch_ms + python_ms, abs=0.06)
    assert ours.int8_model_pass_ms == pytest.approx(ours.model_pass_ms - read_ms / 2, abs=0.11)
    assert published.model_pass_ms > ours.model_pass_ms


def test_all_kinds_of_clusters_are_shipped() -> None:
    assert {path.stem for path in FILES} >= {"7b-nano-150m", "7b-agx-1g", "13b-4bit-nano-150m", "7b-agx-wan-20ms"}


def test_calibrated_stages_take_what_the_calibration_gave() -> None:
    assert shipped("7b-nano-150m").stage_s(0, 16, 500) == pytest.approx(0.071, rel=0.02)
    assert shipped("13b-4bit-nano-150m").stage_s(0, 16, 500) == pytest.approx(0.408, rel=0.03)


def test_the_slow_device_takes_twice_as_long() -> None:
    times = [shipped("7b-agx-slow-one").stage_s(stage, 16, 500) for stage in range(4)]
    assert times[2] == pytest.approx(2 * times[0])
    assert times[0] == times[1] == times[3]


@pytest.mark.parametrize(("name", "knee"), [("7b-weak-compute", 20), ("7b-int4-nano-150m", 25)])
def test_compute_limited_clusters_have_their_knee_where_the_file_says(name: str, knee: int) -> None:
    cluster = shipped(name)
    flat, at_knee, beyond = (cluster.stage_s(0, num_rows, 0) for num_rows in (1, knee, 4 * knee))
    assert flat < at_knee < 1.25 * flat
    assert beyond > 3 * flat


def test_a_forward_costs_the_roofline_and_its_overheads() -> None:
    weights, flops = 1e6 * 2 / 10e9, 2 * 1e6 * 16 / 1e12
    kv = 500 * 128 * 2 / 10e9
    expected = 4 * ((weights**4 + flops**4) ** 0.25 + 0.5e-3 + kv) + 2e-3
    assert DEVICE.forward_s(MODEL, 4, 16, 500) == pytest.approx(expected)
    assert spec(2).stage_s(1, 16, 500) == pytest.approx(expected)
    assert DEVICE.forward_s(MODEL, 4, 0, 500) == 0


def test_a_mixture_reads_what_its_rows_need_and_multiplies_with_that() -> None:
    mixture = replace(MODEL, num_experts=8, experts_per_row=2, expert_params=5e5)
    assert [mixture.read_params(rows) / 1e6 for rows in (1, 2)] == pytest.approx([1 + 1.0, 1 + 0.5 * 8 * (1 - 0.75**2)])
    assert mixture.read_params(1000) == pytest.approx(1e6 + 8 * 5e5), "all experts, and no more"
    assert MODEL.read_params(64) == MODEL.row_params == 1e6 and mixture.row_params == 2e6
    reads = Device("d", memory_gb_s=10.0, compute_tflops=1e6)
    assert reads.forward_s(mixture, 1, 2, 0) == pytest.approx(2 * mixture.read_params(2) / 10e9)
    multiplies = Device("d", memory_gb_s=1e6, compute_tflops=1.0)
    assert multiplies.forward_s(mixture, 1, 16, 0) == pytest.approx(2 * 2e6 * 16 / 1e12)


def test_dequantisation_lengthens_reading_only() -> None:
    slow = replace(MODEL, weight_time_factor=3.0)
    device = Device("d", memory_gb_s=10.0, compute_tflops=1e6)
    assert device.forward_s(slow, 1, 1, 0) == pytest.approx(3 * device.forward_s(MODEL, 1, 1, 0))


@pytest.mark.parametrize(
    ("num_rows", "ms"),
    [(1, 2.0), (4, 2.0), (10, 3.0), (16, 4.0), (24, 8.0), (32, 12.0), (64, 28.0)],
)
def test_a_measured_table_is_interpolated_and_replaces_the_overheads(num_rows: int, ms: float) -> None:
    device = replace(DEVICE, forward_ms=((4, 2.0), (16, 4.0), (32, 12.0)))
    assert device.forward_s(MODEL, 3, num_rows, 0) == pytest.approx(3 * ms / 1e3)
    kv = 3 * 100 * 128 * 2 / 10e9
    assert device.forward_s(MODEL, 3, num_rows, 100) == pytest.approx(3 * ms / 1e3 + kv)


def test_a_table_never_falls_beyond_its_last_entry() -> None:
    falling = replace(DEVICE, forward_ms=((4, 2.0), (16, 1.0)))
    assert falling.forward_s(MODEL, 1, 100, 0) == pytest.approx(1e-3)


def test_a_table_of_one_entry_costs_in_proportion_beyond_it() -> None:
    single = replace(DEVICE, forward_ms=((4, 2.0),))
    assert [single.forward_s(MODEL, 1, num_rows, 0) for num_rows in (1, 4, 6)] == pytest.approx([2e-3, 2e-3, 3e-3])


TABLES = st.lists(
    st.tuples(st.integers(1, 200), st.floats(0.01, 100)), max_size=6, unique_by=lambda entry: entry[0]
).map(lambda entries: tuple(zip(sorted(e[0] for e in entries), sorted(e[1] for e in entries), strict=True)))


@given(
    memory_gb_s=st.floats(1, 1000),
    compute_tflops=st.floats(0.1, 100),
    table=TABLES,
    rows=st.tuples(st.integers(0, 500), st.integers(0, 500)),
    context_len=st.integers(0, 4000),
)
def test_more_rows_never_cost_less(
    memory_gb_s: float,
    compute_tflops: float,
    table: tuple[tuple[int, float], ...],
    rows: tuple[int, int],
    context_len: int,
) -> None:
    device = Device("d", memory_gb_s, compute_tflops, overhead_ms=1.0, layer_overhead_ms=0.1, forward_ms=table)
    fewer, more = (device.forward_s(MODEL, 4, num_rows, context_len) for num_rows in sorted(rows))
    assert 0 <= fewer <= more * (1 + 1e-12)
    assert math.isfinite(more)


def test_a_message_takes_its_bits_over_the_bandwidth() -> None:
    assert LINK.transfer_s(1_000_000) == pytest.approx(0.08)
    assert LINK.transfer_s(0) == 0


def test_a_link_without_jitter_and_loss_delays_nothing() -> None:
    assert LINK.extra_delay_s(10**6, 0.999, 0.0) == 0


def test_jitter_and_loss_delay_a_message() -> None:
    link = replace(LINK, jitter_ms=10.0, loss=0.1, retransmit_ms=200.0)
    assert link.extra_delay_s(1500, 0.5, 0.2) == pytest.approx(0.005)
    assert link.extra_delay_s(1500, 0.5, 0.05) == pytest.approx(0.205)
    # Two packets: one is lost with probability 0.19.
    assert link.extra_delay_s(1501, 0.0, 0.18) == pytest.approx(0.2)
    assert link.extra_delay_s(1501, 0.0, 0.2) == 0


@pytest.mark.parametrize(
    ("num_workers", "broadcast", "messages", "hops"),
    [
        (4, "tree", 2, 6),
        (4, "tree", 1, 3),
        (3, "tree", 1, 2),
        (1, "tree", 1, 1),
        (8, "tree", 2, 8),
        (16, "direct", 1, 1),
    ],
)
def test_a_commit_takes_the_hops_of_its_broadcast(num_workers: int, broadcast: str, messages: int, hops: int) -> None:
    costs = DriverCosts(1, 1, 1, broadcast=broadcast, broadcast_messages=messages)  # pyright: ignore[reportArgumentType]
    assert costs.broadcast_hops(num_workers) == hops


def test_bandwidth_and_latency_are_replaced_on_every_link() -> None:
    changed = spec().with_bandwidth(7.0).with_latency(9.0)
    assert {(link.bandwidth_mbps, link.latency_ms) for link in (*changed.links, changed.control)} == {(7.0, 9.0)}
    assert replace(changed, links=spec().links, control=LINK) == spec()
    with pytest.raises(UsageError, match="bandwidth_mbps is 0"):
        spec().with_bandwidth(0)
    with pytest.raises(UsageError, match="latency_ms is -1"):
        spec().with_latency(-1)


def test_other_stage_counts_repeat_the_devices() -> None:
    slow = replace(DEVICE, name="slow")
    last = replace(LINK, name="last")
    cluster = replace(spec(2), devices=(DEVICE, slow), links=(LINK, LINK, last))
    more = cluster.with_stages(5)
    assert [device.name for device in more.devices] == ["d", "slow", "d", "slow", "d"]
    assert more.links == (LINK,) * 6
    assert more.partition == Partition.even(8, 5)
    assert cluster.with_stages(2) == cluster
    with pytest.raises(UsageError, match="only 8 layers"):
        cluster.with_stages(9)
    with pytest.raises(UsageError, match="at least one"):
        cluster.with_stages(0)


@given(num_rows=st.integers(1, 300), mbps=st.floats(1, 10_000), num_stages=st.integers(2, 8))
def test_tensor_parallel_gets_faster_with_bandwidth_and_galaxy_is_never_slower(
    num_rows: int, mbps: float, num_stages: int
) -> None:
    slow, fast = spec(num_stages).with_bandwidth(mbps), spec(num_stages).with_bandwidth(2 * mbps)
    megatron, galaxy = (slow.tensor_parallel_s(kind, num_rows, 100) for kind in ("tp-megatron", "tp-galaxy"))
    assert galaxy <= megatron
    assert fast.tensor_parallel_s("tp-megatron", num_rows, 100) < megatron
    assert fast.tensor_parallel_s("tp-galaxy", num_rows, 100) <= galaxy


def test_tensor_parallel_pays_two_all_reduces_a_layer() -> None:
    kv = 100 * 128 * 2 / 10e9
    compute = (((1e6 * 2 / 10e9) ** 4 + (2 * 1e6 * 10 / 1e12) ** 4) ** 0.25 + kv) / 4 + 0.5e-3
    wire = 2 * (2 * 3 / 4 * 10 * 64 * 2 * 8 / 100e6)
    waiting = 2 * (2 * 3 * 1e-3 + 3e-3)
    assert spec().tensor_parallel_s("tp-megatron", 10, 100) == pytest.approx(8 * (compute + wire + waiting) + 2e-3)
    assert spec().tensor_parallel_s("tp-galaxy", 10, 100) == pytest.approx(8 * (max(compute, wire) + waiting) + 2e-3)


def test_tensor_parallel_over_one_device_sends_nothing() -> None:
    assert spec(1).tensor_parallel_s("tp-megatron", 10, 100) == pytest.approx(spec(1).stage_s(0, 10, 100))
    assert spec(1).tensor_parallel_s("tp-galaxy", 0, 100) == 0


def test_optional_parts_of_a_file_have_their_defaults() -> None:
    cluster = ClusterDescription.parse(GOOD, "some/where/mine.toml")
    assert cluster.name == "mine"
    assert cluster.partition == Partition.even(8, 2)
    assert cluster.links == (LinkModel("lan", 0.3, 150.0),) * 3
    assert cluster.control == cluster.links[0]
    assert cluster.devices[0].forward_ms == ((1, 2.0), (16, 2.5))
    assert cluster.tensor_parallel == TensorParallel()


def test_links_control_name_and_partition_can_be_given() -> None:
    text = 'name = "other"\n' + GOOD.replace(
        'links = "lan"', 'links = ["lan", "far", "lan"]\ncontrol = "far"\npartition = "0:3,3:8"'
    ).replace("[pipeline]", '[link."far"]\nlatency_ms = 20\nbandwidth_mbps = 50\nloss = 0.01\n[pipeline]')
    cluster = ClusterDescription.parse(text, "mine.toml")
    assert cluster.name == "other"
    assert [link.name for link in cluster.links] == ["lan", "far", "lan"]
    assert cluster.control.latency_ms == 20
    assert str(cluster.partition) == "0:3,3:8"


@pytest.mark.parametrize(
    ("old", "new", "line", "problem"),
    [
        # not TOML
        ("num_layers = 8", "num_layers = ", 4, "not TOML"),
        ("kv_size = 128", "kv_size = 128\nkv_size = 128", 9, "not TOML"),
        # unknown and missing keys
        ("kv_size", "kv_sise", 8, r"\[model\] kv_sise is unknown; did you mean kv_size\? Known: .*hidden_size"),
        ("[model]", "speed = 3\n[model]", 2, "speed is unknown; .* Known: device, driver"),
        ("[pipeline]", "[pipelines]", 22, r"pipelines is unknown; did you mean pipeline\?"),
        ("[driver.ours]", "[driver.our]", 31, r"\[driver\] our is unknown; did you mean ours\?"),
        ("[device.d]", '[device.d]\nname = "d"', 11, r"\[device.d\] name is unknown"),
        ("latency_ms = 0.3\n", "", 18, r"\[link.lan\] latency_ms is missing"),
        ("hidden_size = 64\n", "", 2, r"\[model\] hidden_size is missing"),
        (GOOD[GOOD.index("[driver.ours]") :], "", 26, r"\[driver\] ours is missing; add the table \[driver.ours\]"),
        # wrong types
        ("num_layers = 8", "num_layers = 8.5", 4, "num_layers is 8.5; it must be a whole number"),
        ("num_layers = 8", "num_layers = true", 4, "num_layers is true; it must be a whole number"),
        ("latency_ms = 0.3", "latency_ms = true", 19, "latency_ms is true; it must be a finite number"),
        ("latency_ms = 0.3", "latency_ms = '1'", 19, "latency_ms is '1'; it must be a finite number"),
        ('name = "small"', "name = 3", 3, "name is 3; it must be a text"),
        ("# a cluster", "name = 3", 1, "name is 3; it must be a text"),
        ("# a cluster", "tensor_parallel = 3", 1, r"tensor_parallel is 3; it must be a table, \[tensor_parallel\]"),
        ("[device.d]", "[device]", 11, r"\[device\] memory_gb_s is 10; it must be a table"),
        ("[16, 2.5]", "[16, 2.5, 3]", 13, r"forward_ms is \[\[1.*it must be a list of \[rows, ms\]"),
        ("[16, 2.5]", "[16.5, 2.5]", 13, "forward_ms is .* a list of"),
        ("[16, 2.5]", "16", 13, "forward_ms is .* a list of"),
        ('devices = ["d", "d"]', 'devices = "d"', 23, "devices is 'd'; it must be a list of names"),
        ('devices = ["d", "d"]', 'devices = ["d", 1]', 23, "devices is .* a list of names"),
        ('links = "lan"', "links = 5", 24, "links is 5; it must be a name or a list of names"),
        # out of range
        ("bandwidth_mbps = 150", "bandwidth_mbps = -5", 20, r"\[link.lan\] bandwidth_mbps is -5; it must be positive"),
        ("bandwidth_mbps = 150", "bandwidth_mbps = 0", 20, "bandwidth_mbps is 0; it must be positive"),
        ("bandwidth_mbps = 150", "bandwidth_mbps = nan", 20, "bandwidth_mbps is nan"),
        ("bandwidth_mbps = 150", "bandwidth_mbps = inf", 20, "bandwidth_mbps is inf"),
        ("bandwidth_mbps = 150", f"bandwidth_mbps = {10**400}", 20, "bandwidth_mbps is 1000.*a finite number"),
        ("bandwidth_mbps = 150", "bandwidth_mbps = 150\nloss = 1", 21, r"loss is 1; it must lie in \[0, 1\)"),
        ("latency_ms = 0.3", "latency_ms = -0.3", 19, "latency_ms is -0.3; it must be 0 or positive"),
        ("memory_gb_s = 10", "memory_gb_s = 0", 11, "memory_gb_s is 0"),
        ("num_layers = 8", "num_layers = 0", 4, "num_layers is 0"),
        ("num_layers = 8", "experts_per_row = 2\nnum_layers = 8", 4, "experts_per_row is 2, of 0 experts"),
        ("num_layers = 8", "num_layers = 8\nexpert_params = 9", 5, "expert_params goes with num_experts"),
        ("[16, 2.5]", "[1, 2.5]", 13, "forward_ms has the rows .* ascend"),
        ("[16, 2.5]", "[16, -2.5]", 13, "forward_ms has a time that is not positive"),
        ("[16, 2.5]", "[16, nan]", 13, "forward_ms"),
        (
            "[driver.ours]",
            '[driver.ours]\nbroadcast = "mesh"',
            32,
            r"\[driver.ours\] broadcast is 'mesh'; it must be 'direct' or 'tree'",
        ),
        ("[driver.ours]\n", "[driver.ours]\nbroadcast_messages = 0\n", 32, "broadcast_messages is 0"),
        ("[driver.ours]\n", "[driver.ours]\nint8_draft_pass_ms = -1\n", 32, "int8_draft_pass_ms is -1"),
        ("# a cluster", "tensor_parallel.collective_overhead_ms = -1", 1, "collective_overhead_ms is -1"),
        # names, counts and partitions
        (
            'devices = ["d", "d"]',
            'devices = ["d", "dd"]',
            23,
            r"devices names 'dd', but there is no \[device.dd\]; .*d",
        ),
        ('links = "lan"', 'links = "lam"', 24, r"links names 'lam'.*did you mean lan\?"),
        ('links = "lan"', 'links = "lan"\ncontrol = "wan"', 25, "control names 'wan'"),
        ('links = "lan"', 'links = ["lan", "lan"]', 24, "links has 2 names for 2 devices; .* or 3"),
        ('links = "lan"', "links = []", 24, "links is empty"),
        ('devices = ["d", "d"]', "devices = []", 23, "devices is empty"),
        ('devices = ["d", "d"]', f"devices = {['d'] * 9}", 23, "devices: 9 stages, but the model has only 8 layers"),
        ('links = "lan"', 'links = "lan"\npartition = "0:3,4:8"', 25, "partition 0:3,4:8 leaves a gap"),
        ('links = "lan"', 'links = "lan"\npartition = "0:3,3:7"', 25, "partition 0:3,3:7 covers 7 layers"),
        ('links = "lan"', 'links = "lan"\npartition = "0:8"', 25, "partition 0:8 has 1 stages for 2 devices"),
        ('links = "lan"', 'links = "lan"\npartition = "half"', 25, "partition 'half'.*write ranges as START:END"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line_and_key(old: str, new: str, line: int, problem: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    with pytest.raises(UsageError, match=rf"^bad\.toml, line {line}: .*{problem}"):
        ClusterDescription.parse(text, "bad.toml")


@pytest.mark.parametrize("key", ["model", "device", "link", "pipeline", "driver"])
def test_a_missing_table_is_named(key: str) -> None:
    with pytest.raises(UsageError, match=rf"^bad\.toml: {key} is missing; add the table \[{key}\]"):
        ClusterDescription.parse("\n\n".join(part for part in GOOD.split("\n\n") if f"[{key}" not in part), "bad.toml")


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("[link.lan]\nlatency_ms = 1\nbandwidth_mbps = -5", 20),
        ('[link."lan"]\n"bandwidth_mbps" = -5\nlatency_ms = 1', 19),
        ("[ link . lan ]  # wide\n\n# latency\nlatency_ms = 1\n\nbandwidth_mbps=-5", 23),
        ("[link]\nlan.latency_ms = 1\nlan.bandwidth_mbps = -5", 20),
        ("[link]\nlan = {latency_ms = 1, bandwidth_mbps = -5}", 19),
        ("[link.other]\nlatency_ms = 1\nbandwidth_mbps = 5\n[link.lan]\nlatency_ms = 1\nbandwidth_mbps = -5", 23),
    ],
)
def test_the_line_is_found_however_the_key_is_written(written: str, line: int) -> None:
    text = GOOD.replace("[link.lan]\nlatency_ms = 0.3\nbandwidth_mbps = 150", written)
    with pytest.raises(UsageError, match=rf"^bad\.toml, line {line}: \[link\.lan\] bandwidth_mbps is -5"):
        ClusterDescription.parse(text, "bad.toml")
    with pytest.raises(UsageError, match=rf"^bad\.toml, line {line}: "):
        ClusterDescription.parse(text.replace("\n", "\r\n"), "bad.toml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: No such file"):
        ClusterDescription.load(tmp_path / "nowhere.toml")
    with pytest.raises(UsageError, match="directory"):
        ClusterDescription.load(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        ClusterDescription.load(binary)


def test_a_cluster_made_in_code_is_checked_too() -> None:
    with pytest.raises(UsageError, match="devices is empty"):
        replace(spec(), devices=())
    with pytest.raises(UsageError, match="links has 2 names for 4 devices"):
        replace(spec(), links=(LINK, LINK))
    with pytest.raises(UsageError, match="covers 9 layers, but the model has 8"):
        replace(spec(), partition=Partition.even(9, 4))
