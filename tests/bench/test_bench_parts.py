from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.bench import plots
from flowspec.bench.prompts import Prompt, read_prompts
from flowspec.bench.report import (
    environment,
    markdown_table,
    ratio_interval,
    results_cells,
    results_json,
)
from flowspec.bench.trace import TraceRun, write_trace
from flowspec.errors import UsageError
from flowspec.request.emissions import Emissions
from flowspec.request.records import RequestRecord, ScheduleResult, SegmentRecord, Span

SCHEDULES = ("ar", "serial", "chunked", "pipedec", "lockstep", "flow", "tp-megatron", "tp-galaxy")


def record(
    index: int, num_tokens: int = 32, decode_s: float = 1.0, segments: tuple[SegmentRecord, ...] = ()
) -> RequestRecord:
    return RequestRecord(
        index=index,
        token_ids=tuple(range(num_tokens + 1)),
        emissions=Emissions(0.0, 0.25, 1, 0.25 + decode_s, num_tokens + 1),
        segments=20,
        rows=160,
        drafted=140,
        accepted=num_tokens // 2,
        verified=16,
        restarts=3,
        draft_passes=9,
        link_bytes=1_234_567,
        busy_s=(0.1 * decode_s, 0.5 * decode_s, 0.75 * decode_s),
        segment_records=segments,
    )


def result(schedule: str, tokens_per_s: float = 20.0) -> ScheduleResult:
    return ScheduleResult(schedule, tokens_per_s, 1.5, 7.25, 4, (0.25, 0.5), 0.125, 2_500_000, 96, 4.75)


def run(name: str = "flow, 3 stages", num_spans: int = 40) -> TraceRun:
    spans: list[Span] = []
    for i in range(num_spans):
        spans.append(Span(0, 0.010 * i, 0.010 * i + 0.003, ("draft pass", "verify", "tidy")[i % 3]))
        spans += [
            Span(p, 0.010 * (i + p), 0.010 * (i + p) + 0.0099, "forward", num_rows=16, segment_id=i) for p in (1, 2, 3)
        ]
    return TraceRun(name, ("driver", "worker 1", "worker 2", "worker 3"), spans)


# --- prompts ---


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def question(question_id: int | str, *turns: str, **more: object) -> str:
    return json.dumps({"question_id": question_id, "turns": turns, **more}, ensure_ascii=False)


def test_questions_keep_ids_categories_and_turns(tmp_path: Path) -> None:
    lines = [
        question(81, "Hello", "And\nmore", category="writing", reference=["x"]),
        "",
        question("q-2", "line\u2028separator\u0085inside"),
        question(3, "x", category=None),
    ]
    expected = [
        Prompt("81", "writing", ("Hello", "And\nmore")),
        Prompt("q-2", "", ("line\u2028separator\u0085inside",)),
        Prompt("3", "", ("x",)),
    ]
    for name in ("question.jsonl", "questions.txt"):  # by its name, by its content
        for newline in ("\n", "\r\n"):
            assert read_prompts(write(tmp_path / name, newline.join(lines))) == expected
    assert read_prompts(write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines[0].encode())) == expected[:1]


def test_a_plain_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "  indented code\r\n\n   \n[1, 2]\n{broken\n")
    assert read_prompts(path) == [
        Prompt("1", "", ("  indented code",)),
        Prompt("4", "", ("[1, 2]",)),
        Prompt("5", "", ("{broken",)),
    ]


@given(num=st.none() | st.integers(1, 9), start=st.integers(0, 4))
def test_num_and_start_are_a_slice(tmp_path_factory: pytest.TempPathFactory, num: int | None, start: int) -> None:
    path = write(tmp_path_factory.getbasetemp() / "slice.txt", "a\nb\nc\nd\ne\n")
    wanted = "abcde"[start:] if num is None else "abcde"[start : start + num]
    assert [prompt.turns[0] for prompt in read_prompts(path, num, start)] == list(wanted)


GOOD = question(1, "ok") + "\n"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (GOOD + "\n{broken", 3, "malformed"),
        (GOOD + "[]", 2, "Expected `object`"),
        (GOOD + '{"question_id": 2}', 2, "missing required field `turns`"),
        (GOOD + '{"turns": ["x"]}', 2, "missing required field `question_id`"),
        (GOOD + question(2), 2, "length >= 1"),
        (GOOD + question(2, "x", "  "), 2, "turn 2 is empty"),
        (GOOD + '{"question_id": 2, "turns": "x"}', 2, "Expected `array`"),
        (GOOD + '{"question_id": 2, "turns": [5]}', 2, "Expected `str`"),
        (GOOD + '{"question_id": true, "turns": ["x"]}', 2, "question_id"),
        (GOOD + question(2, "x", category=7), 2, "category"),
        (GOOD.encode() + b'\n\n{"question_id": 2, "turns": ["\xff"]}', 4, "UTF-8"),
        (b"\xef\xbb\xbf" + GOOD.encode() + b"\xff", 2, "UTF-8"),
        ("", 1, "no prompt"),
        ("\n  \n", 1, "no prompt"),
    ],
)
def test_every_error_in_a_prompt_file_names_its_line(
    tmp_path: Path, text: str | bytes, line: int, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        read_prompts(write(tmp_path / "question.jsonl", text))
    assert f"question.jsonl:{line}:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "a\nb\n")
    with pytest.raises(UsageError, match=r"prompts.txt:2: the file ends after 2 prompts; start 2"):
        read_prompts(path, start=2)
    with pytest.raises(UsageError, match="0 or more"):
        read_prompts(path, start=-1)
    with pytest.raises(UsageError, match="at least 1"):
        read_prompts(path, num=0)
    for missing in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UsageError, match="cannot read prompts"):
            read_prompts(missing)


# --- traces ---


def test_a_trace_has_a_process_for_each_run_and_a_thread_for_each_place(tmp_path: Path) -> None:
    runs = [run("flow"), run("serial", num_spans=5)]
    write_trace(tmp_path / "trace.json", runs)
    trace = json.loads((tmp_path / "trace.json").read_bytes())
    assert set(trace) == {"traceEvents", "displayTimeUnit"} and trace["displayTimeUnit"] == "ms"
    events = trace["traceEvents"]
    metadata = [event for event in events if event["ph"] == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in metadata if e["name"] == "process_name"}
    assert list(processes.values()) == ["flow", "serial"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert list(threads.values()) == 2 * ["driver", "worker 1", "worker 2", "worker 3"]
    assert len({tid for _, tid in threads}) == len(threads), "viewers merge threads of one id"
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in metadata if e["name"] == "thread_sort_index"}
    assert list(order) == list(threads) and list(order.values()) == [0, 1, 2, 3, 0, 1, 2, 3]

    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) + len(metadata) == len(events)
    assert len(complete) == sum(len(r.spans) for r in runs)
    assert all((e["pid"], e["tid"]) in threads and e["ts"] >= 0 and e["dur"] >= 0 for e in complete)
    forward = next(e for e in complete if threads[e["pid"], e["tid"]] == "worker 2")
    assert forward["name"] == "forward 16 rows"
    assert forward["args"] == {"rows": 16, "segment_id": 0}
    assert forward["ts"] == pytest.approx(20_000) and forward["dur"] == pytest.approx(9_900)
    assert {e["name"] for e in complete if threads[e["pid"], e["tid"]] == "driver"} == {"draft pass", "verify", "tidy"}


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=20).map(sorted))
def test_spans_that_touch_do_not_overlap_in_a_trace(
    tmp_path_factory: pytest.TempPathFactory, times: list[float]
) -> None:
    path = tmp_path_factory.getbasetemp() / "touching.json"
    write_trace(path, [TraceRun("r", ["driver"], [Span(0, a, b, "draft") for a, b in pairwise(times)])])
    events = [e for e in json.loads(path.read_bytes())["traceEvents"] if e["ph"] == "X"]
    for left, right in pairwise(events):
        assert round(1000 * left["ts"]) + round(1000 * left["dur"]) <= round(1000 * right["ts"])


def test_a_span_lies_at_a_place_of_its_run_and_ends_after_its_start(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="places"):
        TraceRun("r", ["driver"], [Span(1, 0.0, 1.0, "forward")])
    with pytest.raises(AssertionError, match="before it starts"):
        TraceRun("r", ["driver"], [Span(0, 1.0, 0.5, "draft")])
    with pytest.raises(UsageError, match="cannot write the trace"):
        write_trace(tmp_path / "none" / "trace.json", [run()])


# --- plots ---


def segments(*accepted: int) -> tuple[SegmentRecord, ...]:
    return tuple(SegmentRecord(i, 0.1 * i, 16, 3, n) for i, n in enumerate(accepted))


FATES = {i: ((2, 9, 16), (0, 4, 16), (0, 0, 16))[i % 3] for i in range(2, 40)}
PLOTS: dict[str, Callable[[Path], None]] = {
    "bars": lambda path: plots.throughput_bars(
        path,
        {f"cluster {c}": [result(name, c * (5.0 + 7 * i)) for i, name in enumerate(SCHEDULES)] for c in (1, 2)},
        "Qwen3-8B over two clusters of four devices, Spec-Bench 80 questions, temperature 0, 256 tokens each, seed 0",
    ),
    "bars without baselines": lambda path: plots.throughput_bars(path, {"one": [result("flow")]}, "flow alone"),
    "timeline": lambda path: plots.timeline(path, [run(), run("serial", 12)], 0.05, 0.35, "two runs", [FATES, None]),
    "timeline of work": lambda path: plots.timeline(path, [run()], 0.0, 0.2, "one run"),
    "timeline of nothing": lambda path: plots.timeline(path, [TraceRun("idle", ["driver"], [])], 0.0, 1.0, "idle"),
    "accepted": lambda path: plots.accepted_per_segment(
        path,
        {
            "flow": [record(0, segments=segments(0, 1, 1, 2, 3, 7, 9)), record(1, segments=segments(1, 4))],
            "chunked": [record(0, segments=segments(1, 1, 2, 5))],
            "serial": [record(0, segments=(SegmentRecord(0, 0.0, 16, 0, 0),))],  # verified none
        },
        "costs $5 and $6",  # no formula
    ),
    "sweep": lambda path: plots.sweep(
        path,
        "bandwidth, Mbit/s",
        [10, 30, 100, 300, 1000],
        {name: [3 + i, 5 + i, 8 + i, 9 + i, math.nan] for i, name in enumerate((*SCHEDULES, "mine"))},
        "throughput over bandwidth",
        log_x=True,
    ),
    "sweep of one": lambda path: plots.sweep(path, "stages", [4], {"flow": [3.0]}, "one point"),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_png_with_something_on_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "plot.png"
    PLOTS[name](path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5_000


def test_a_schedule_has_one_colour_whatever_else_is_drawn() -> None:
    alone = {name: plots.colors([name])[name] for name in (*SCHEDULES, "mine")}
    together = plots.colors([*reversed(SCHEDULES), "mine"])
    assert together == alone
    assert len(set(together.values())) == len(together)
    many = plots.colors([*SCHEDULES, *(f"variant {i}" for i in range(6))])
    assert len(set(many.values())) == len(many)
    assert len(plots.colors(f"variant {i}" for i in range(50))) == 50


def test_what_cannot_be_drawn_or_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is empty"):
        plots.timeline(tmp_path / "plot.png", [run()], 0.2, 0.2, "nothing")
    with pytest.raises(UsageError, match="cannot write the plot"):
        plots.sweep(tmp_path / "none" / "plot.png", "stages", [1, 2], {"flow": [1, 2]}, "no directory")


def test_only_plots_load_matplotlib() -> None:
    code = (
        "import sys, flowspec.bench.prompts, flowspec.bench.trace, flowspec.bench.report;"
        "print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    )
    code_of_plots = "import sys, flowspec.bench.plots; print('matplotlib.pyplot' in sys.modules)"
    for source, expected in ((code, "False False"), (code_of_plots, "False")):
        output = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
        assert output.stdout.strip() == expected


# --- reports ---


def test_the_table_gives_ratios_to_the_baselines_that_ran() -> None:
    headings, *_, flow = results_cells([result("ar", 10.0), result("chunked", 16.0), result("flow", 24.0)])
    assert "x chunked" in headings and "x ar" in headings
    assert flow == ["flow", "24.00", "1.50", "2.40", "1.50", "7.2", "4", "50", "12", "2.50"]
    assert "x chunked" not in results_cells([result("ar"), result("flow")])[0]
    assert not any(heading.startswith("x ") for heading in results_cells([result("flow")])[0])


def test_a_markdown_table_is_aligned() -> None:
    text = markdown_table(["schedule", "t/s"], [["flow", 12.5], ["a|b", "3"], ["tensor parallel", ""]])
    assert text == "\n".join(
        [
            "| schedule        |  t/s |",
            "| --------------- | ---: |",
            "| flow            | 12.5 |",
            "| a\\|b            |    3 |",
            "| tensor parallel |      |",
        ]
    )
    assert markdown_table(["a"], []) == "| a   |\n| --- |"
    with pytest.raises(AssertionError, match="cells"):
        markdown_table(["a", "b"], [["1"]])


def test_the_json_has_exactly_its_keys_and_six_digits() -> None:
    made = results_json("home", "demo", 7, {"depth": 6}, [ScheduleResult.of("flow", [record(0), record(1, 41, 1.7)])])
    assert made == json.loads(json.dumps(made))
    assert list(made) == ["cluster", "model", "seed", "settings", "results"]
    assert made["cluster"] == "home" and made["model"] == "demo" and made["seed"] == 7
    assert made["settings"] == {"depth": 6}
    [entry] = made["results"]
    assert list(entry) == [
        "schedule", "tokens_per_s", "mean_accepted", "rows_per_segment", "restarts",
        "stage_busy", "driver_busy", "link_bytes", "num_tokens", "virtual_s",
    ]  # fmt: skip
    assert entry["tokens_per_s"] == 27.037  # 73 / 2.7 = 27.037037
    assert entry["stage_busy"] == [0.5, 0.75] and entry["num_tokens"] == 75 and entry["virtual_s"] == 3.2


def test_the_environment_names_versions_and_machine() -> None:
    found = environment()
    assert list(found) == [
        "commit", "python", "torch", "transformers", "flowspec",
        "machine", "processor", "num_cores", "memory_bytes",
    ]  # fmt: skip
    assert found["python"] == sys.version.split()[0] and found["torch"] and found["transformers"]
    assert found["commit"] is None or len(found["commit"]) == 40
    assert 1 <= found["num_cores"] <= (os.cpu_count() or 1)
    assert found["memory_bytes"] is None or found["memory_bytes"] > 2**28
    json.dumps(found)


requests = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0.1, 20.0), st.integers(1, 60), st.floats(0.1, 20.0)),
    min_size=1,
    max_size=8,
)


@given(requests, st.integers(0, 3))
def test_a_ratio_lies_in_its_interval(drawn: list[tuple[int, float, int, float]], seed: int) -> None:
    above = [record(i, tokens, seconds) for i, (tokens, seconds, _, _) in enumerate(drawn)]
    below = [record(i, tokens, seconds) for i, (_, _, tokens, seconds) in enumerate(drawn)]
    ratio, low, high = ratio_interval(above, below, seed, num_resamples=200)
    assert low <= ratio <= high
    of_totals = ScheduleResult.of("a", above).tokens_per_s / ScheduleResult.of("b", below).tokens_per_s
    assert ratio == pytest.approx(of_totals)
    assert ratio_interval(above[::-1], below, seed, num_resamples=200) == (ratio, low, high)
    assert ratio_interval(above, above, seed, num_resamples=200) == (1.0, 1.0, 1.0)


def test_an_interval_is_that_of_pairs() -> None:
    # Long and short requests differ much, the two schedules by the same factor on each of them.
    below = [record(i, 32, 1.0 + i) for i in range(12)]
    above = [record(i, 32, (1.0 + i) / 2) for i in range(12)]
    assert ratio_interval(above, below) == pytest.approx((2.0, 2.0, 2.0))
    mixed = [record(i, 32, (1.0 + i) / (1.5 + i % 2)) for i in range(12)]
    ratio, low, high = ratio_interval(mixed, below)
    assert 1.5 < low < ratio < high < 2.5


def test_an_interval_needs_the_same_requests() -> None:
    with pytest.raises(AssertionError, match="different requests"):
        ratio_interval([record(0), record(1)], [record(0), record(2)])
    with pytest.raises(AssertionError, match="twice"):
        ratio_interval([record(0), record(0)], [record(0), record(0)])
