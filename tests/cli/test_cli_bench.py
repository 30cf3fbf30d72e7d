"""``simulate`` and ``bench`` as a user meets them: what they print, what they write, and what they refuse."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from command_line import Run, apart_from_progress
from flowspec.bench.prompts import BUILT_IN_PROMPTS
from flowspec.bench.study import check_same_tokens
from flowspec.cli.options import ABLATION_NAMES, SCHEDULE_NAMES
from flowspec.config import PUBLISHED_TREE, LockstepConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.emulation.experiment import TENSOR_PARALLEL
from flowspec.errors import FlowspecError
from flowspec.request.emissions import Emissions
from flowspec.request.records import RequestRecord
from flowspec.schedule.catalogue import ABLATIONS, AUTO, SCHEDULES
from worker_process import WorkerProcess

CLUSTER = str(Path(__file__).parents[2] / "clusters" / "7b-nano-150m.toml")
SMALL = ("--num-prompts", "2", "--max-new-tokens", "16", "--jobs", "1")


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# --- simulate ---


@pytest.fixture
def simulated(run: Run) -> Callable[..., str]:
    def simulate(*arguments: str) -> str:
        done = run("simulate", CLUSTER, *SMALL, *arguments)
        assert done.code == 0, done.err
        assert apart_from_progress(done.err) == "", "silent in a pipe"
        return done.out

    return simulate


def test_json_is_one_object_with_these_keys(simulated: Callable[..., str]) -> None:
    values = json.loads(simulated("--json", "--bandwidth", "300", "--slow", "2:0.5:3", "--tree-size", "40"))
    assert values.keys() == {"cluster", "model", "seed", "settings", "results"}
    assert (values["cluster"], values["model"], values["seed"]) == ("7b-nano-150m", "synthetic:eagle1", 0)
    settings = values["settings"]
    assert settings.keys() == {
        "max_new_tokens", "temperature", "num_prompts", "as_published", "draft_quality", "draft", "int8_draft",
        "schedule_config", "overrides", "faults",
    }  # fmt: skip
    assert settings["overrides"] == {"bandwidth_mbps": 300, "latency_ms": None, "num_stages": None}
    assert settings["faults"] == {"max_delay_ms": 0, "slowdown": {"worker": 2, "from_s": 0.5, "times": 3}}
    assert settings["schedule_config"]["flow"]["size"] == 41, "the root is one more"
    assert [result["schedule"] for result in values["results"]] == list(SCHEDULES)
    for result in values["results"]:
        assert result.keys() == {
            "schedule", "tokens_per_s", "mean_accepted", "rows_per_segment", "restarts", "stage_busy", "driver_busy",
            "link_bytes", "num_tokens", "virtual_s",
        }  # fmt: skip
        assert result["num_tokens"] == 32 and len(result["stage_busy"]) == 4


def test_the_same_command_prints_the_same_bytes_on_any_number_of_processes(simulated: Callable[..., str]) -> None:
    arguments = ("--json", "--temperature", "1", "--schedule", "ar,flow", "--seed", "5", "--delay", "3")
    once = simulated(*arguments)
    assert simulated(*arguments) == once
    assert simulated(*arguments, "--jobs", "2") == once
    assert simulated(*arguments, "--seed", "6") != once


def test_faults_and_clusters_change_the_figures_and_not_the_number_of_tokens(simulated: Callable[..., str]) -> None:
    def first(*arguments: str) -> dict[str, float]:
        return json.loads(simulated("--json", "--schedule", "flow", *arguments))["results"][0]

    plain = first()
    for change in (["--latency", "20"], ["--delay", "30"], ["--slow", "3:0:4"], ["--draft-quality", "eagle3"]):
        other = first(*change)
        assert other["virtual_s"] != plain["virtual_s"], change
        assert other["num_tokens"] == plain["num_tokens"]
    stages = json.loads(simulated("--json", "--schedule", "flow", "--stages", "8"))["results"][0]["stage_busy"]
    assert len(stages) == 8


@pytest.mark.parametrize("options", [[], ["--model", "demo", "--temperature", "0.8"]], ids=["synthetic", "demo"])
def test_an_int8_draft_costs_less_and_changes_no_token(
    simulated: Callable[..., str], tmp_path: Path, options: list[str]
) -> None:
    def draft_passes(*more: str) -> tuple[int, set[int]]:
        trace = tmp_path / "trace.json"
        values = json.loads(simulated("--json", "--schedule", "serial", "--trace", str(trace), *options, *more))
        assert values["settings"]["int8_draft"] is bool(more)
        events = json.loads(trace.read_text())["traceEvents"]
        return values["results"][0]["num_tokens"], {round(e["dur"]) for e in events if e["name"].startswith("draft")}

    num_tokens, microseconds = draft_passes()
    assert draft_passes("--draft-dtype", "int8") == (num_tokens, {8100}) and microseconds == {15600}


def test_the_table_has_the_ratios_and_says_which_costs_were_used(simulated: Callable[..., str]) -> None:
    published = simulated("--as-published")
    assert "x chunked" in published and "x ar" in published
    assert "[driver.published] of the cluster file, for flow [driver.ours]" in published
    assert "…" not in published, "no figure is cut"
    ours = simulated()
    assert "[driver.ours] of the cluster file for all schedules" in ours
    assert ours != published


def test_a_switch_of_lockstep_is_in_its_name(simulated: Callable[..., str]) -> None:
    def row(*arguments: str) -> dict[str, object]:
        return json.loads(simulated("--json", *arguments))["results"][-1]

    switched = row("--schedule", "ar,lockstep", "--no-score-order", "--no-expand")
    assert switched["schedule"] == "lockstep-no-score-order-no-expand"
    assert row("--schedule", "lockstep", "--no-prune") == row("--schedule", "lockstep-no-prune")


def test_traces_and_plots_are_written(simulated: Callable[..., str], tmp_path: Path) -> None:
    trace, plot, timeline = (tmp_path / name for name in ("trace.json", "plot.png", "timeline.png"))
    simulated(
        "--schedule", "ar,flow,tp-galaxy", "--trace", str(trace), "--plot", str(plot), "--timeline", str(timeline)
    )  # fmt: skip
    events = json.loads(trace.read_bytes())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["ar", "flow", "tp-galaxy"]
    assert {event["cat"] for event in events if event["ph"] == "X"} >= {"forward", "draft pass"}
    assert is_png(plot) and is_png(timeline)


def test_clients_at_once_bring_throughput(simulated: Callable[..., str]) -> None:
    assert "to first token" in simulated("--schedule", "serial,flow", "--clients", "1,4")
    values = json.loads(simulated("--schedule", "flow", "--clients", "4,1", "--json"))
    four, one = values["results"]
    assert (four["num_clients"], one["num_clients"]) == (4, 1)
    assert four["times_fewest"] == four["tokens_per_s"] / one["tokens_per_s"] > 1.5


def test_a_real_model_runs_in_the_simulator(run: Run) -> None:
    done = run(
        "simulate", CLUSTER, "--model", "demo", "--num-prompts", "1", "--max-new-tokens", "12", "--jobs", "1", "--json"
    )  # fmt: skip
    assert done.code == 0, done.err
    values = json.loads(done.out)
    assert (values["model"], values["settings"]["draft"], values["settings"]["draft_quality"]) == ("demo", "auto", None)
    assert {result["num_tokens"] for result in values["results"]} == {12}


def test_a_file_gives_first_turns_and_may_be_cut(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps({"question_id": i, "turns": [f"text {i}", "more"]}) + "\n" for i in range(3)))
    lines = tmp_path / "prompts.txt"
    lines.write_text("text 0\ntext 1\n")
    arguments = ("--schedule", "flow", "--max-new-tokens", "8", "--jobs", "1", "--json")
    cut = run("simulate", CLUSTER, *arguments, "--prompts", str(file), "--num-prompts", "2")
    assert json.loads(cut.out) == json.loads(run("simulate", CLUSTER, *arguments, "--prompts", str(lines)).out)


def test_a_schedule_that_changes_the_text_is_an_error() -> None:
    record = RequestRecord(7, (1, 2, 3), Emissions(0.0, 1.0, 1, 2.0, 3), 2, 2, 0, 0, 2, 0, 0, 100, (0.0, 0.5))
    check_same_tokens({"ar": [record], "flow": [record]})
    with pytest.raises(FlowspecError, match=r"flow gave other tokens than ar for prompt 7.*please report"):
        check_same_tokens({"ar": [record], "flow": [replace(record, token_ids=(1, 2, 4))]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "ar,nonsense"], "'nonsense' is none of auto, ar, serial, chunked"),
        (["--schedule", "ar,,flow"], "has an empty place"),
        (["--schedule", "ar,ar"], "names ar twice"),
        (["--schedule", "lockstep,lockstep-no-prune", "--no-prune"], "lockstep-no-prune would run twice"),
        (["--schedule", "ar", "--no-expand"], "are for lockstep"),
        (["--draft-quality", "eagle9"], "'eagle9' is none of eagle1, eagle3"),
        (["--draft-quality", "eagle1", "--model", "demo"], "is of the synthetic model"),
        (["--draft", "none"], "is for a real model"),
        (["--model", "no/such/model"], "is not a directory"),
        (["--model", "demo", "--stages", "16"], "8 layers, too few for 16 stages"),
        (["--model", "demo", "--prompts", "{long}"], "the model has room for 1 to 1023"),
        (["--prompts", "/no/such/file"], "cannot read prompts from /no/such/file"),
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--max-new-tokens", "-1"], "max_tokens is -1"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--seed", "-1"], "seed is -1"),
        (["--tree-depth", "0"], "depth is 0"),
        (["--tree-size", "-1"], "--tree-size is -1"),
        (["--segment-len", "-1"], "segment_len is -1"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--bandwidth", "0"], "bandwidth_mbps is 0"),
        (["--latency", "-1"], "latency_ms is -1"),
        (["--stages", "0"], "at least one is needed"),
        (["--stages", "33"], "only 32 layers"),
        (["--delay", "nan"], "--delay is nan"),
        (["--slow", "1"], "is not WORKER:FROM_S:TIMES"),
        (["--slow", "5:0:2"], "workers 1 to 4"),
        (["--slow", "1:-1:2"], "begins at -1 s"),
        (["--slow", "1:0:0"], "is 0 times"),
        (["--trace", "/no/such/place/trace.json"], "cannot write"),
        (["--plot", "/"], "cannot write"),
        (["--clients", "0"], "no list of counts"),
        (["--clients", "2,2"], "names 2 twice"),
        (["--clients", "1", "--plot", "x.png"], "draws nothing"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    long = tmp_path / "long.txt"
    long.write_text("x = 1; " * 1500)
    done = run("simulate", CLUSTER, "--jobs", "1", *(argument.format(long=long) for argument in arguments))
    assert (done.code, done.out) == (2, "")
    assert message in done.err and done.err.count("\n") == 1, done.err


def test_a_cluster_file_that_is_missing_or_wrong_is_one_line(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[model]\nnum_layers = 'many'\n")
    for path in (wrong, tmp_path / "missing.toml"):
        for command in ("simulate", "bench"):
            done = run(command, str(path))
            assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
            assert str(path) in done.err


# --- bench ---


def test_bench_of_a_cluster_writes_all_files(run: Run, tmp_path: Path) -> None:
    arguments = (
        "bench", CLUSTER, "--num-prompts", "2", "--max-new-tokens", "8", "--jobs", "1",
        "--schedule", "ar,chunked,flow", "--sweep", "--trace", str(tmp_path / "trace.json"), "--out", str(tmp_path),
    )  # fmt: skip
    done = run(*arguments)
    assert done.code == 0, done.err
    assert "temperature 0\n" in done.out and "temperature 1\n" in done.out and str(tmp_path) in done.out
    for name in ("throughput", "accepted", "timeline", "bandwidth", "latency", "stages"):
        assert is_png(tmp_path / f"{name}.png")
    assert json.loads((tmp_path / "trace.json").read_bytes())["traceEvents"]
    values = json.loads((tmp_path / "results.json").read_bytes())
    assert values.keys() == {"environment", "flags", "runs", "sweeps"}
    assert shlex.split(values["flags"]) == list(arguments)
    assert [run["settings"]["temperature"] for run in values["runs"]] == [0, 1]
    for of_temperature in values["runs"]:
        assert of_temperature.keys() == {"cluster", "model", "seed", "settings", "results", "ratios"}
        assert of_temperature["ratios"].keys() == {"ar", "chunked", "flow"}
        for baseline in ("chunked", "ar"):
            ratio = of_temperature["ratios"]["flow"][baseline]
            assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    points = {name: sweep["values"] for name, sweep in values["sweeps"].items()}
    assert points == {"bandwidth": [125, 250, 500, 1000], "latency": [0.3, 2, 5, 20, 50], "stages": [2, 4, 8, 16]}
    for sweep in values["sweeps"].values():
        assert all(len(series) == len(sweep["values"]) for series in sweep["tokens_per_s"].values())


def test_bench_without_a_cluster_runs_on_this_machine(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "results"
    done = run(
        "bench", "--stages", "2", "--schedule", "ar,flow", "--num-prompts", "1", "--max-new-tokens", "8",
        "--temperatures", "0", "--repeats", "2", "--out", str(out),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "tokens/s" in done.out
    values = json.loads((out / "results.json").read_bytes())
    (of_temperature,) = values["runs"]
    assert (of_temperature["cluster"], of_temperature["model"]) == (None, "demo")
    assert of_temperature["settings"] == {
        "max_new_tokens": 8, "temperature": 0, "num_prompts": 1, "repeats": 2, "draft": "auto", "draft_dtype": "auto",
            "draft_layers": None,
        "schedule_config": asdict(ScheduleConfig()), "workers": None, "draft_worker": None,
        "partition": "0:4,4:8", "dtype": "float32",
        "device": "cpu", "int8_wire": False,
    }  # fmt: skip
    for result in of_temperature["results"]:
        assert result["num_tokens"] == 8 and result["tokens_per_s"] > 0 and result["link_bytes"] > 0
        assert len(result["stage_busy"]) == 2 and all(0 < share <= 1 for share in result["stage_busy"])
    for name in ("throughput", "accepted", "timeline"):
        assert is_png(out / f"{name}.png")


def test_bench_runs_over_workers_elsewhere_with_trees_as_they_are_asked_for(
    run: Run, checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("t1 t4 t2\n")
    worker = WorkerProcess()
    try:
        done = run(
            "bench", "--model", str(checkpoint_dir("llama")), "--draft", "ngram", "--workers", worker.address,
            "--prompts", str(tmp_path / "prompts.txt"), "--schedule", "ar,lockstep,flow", "--max-new-tokens", "8",
            "--temperatures", "0", "--tree-top-k", "3", "--tree-depth", "4", "--tree-size", "20",
            "--min-probability", "0.1", "--segment-len", "5", "--out", str(tmp_path),
        )  # fmt: skip
    finally:
        worker.end()
    assert done.code == 0, done.err
    (of_temperature,) = json.loads((tmp_path / "results.json").read_bytes())["runs"]
    settings = of_temperature["settings"]
    assert (settings["workers"], settings["partition"]) == ([worker.address], "0:6")
    asked = {"top_k": 3, "depth": 4, "max_depth": 8, "size": 21, "min_probability": 0.1}
    assert settings["schedule_config"] == asdict(
        ScheduleConfig(
            flow=replace(TreeConfig(), **asked),
            lockstep=LockstepConfig(replace(PUBLISHED_TREE, **asked)),
            pipeline=PipelineConfig(segment_len=5),
        )
    )
    assert all(0 < result["stage_busy"][0] <= 1 for result in of_temperature["results"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep"], "--sweep is for the simulator"),
        (["--bandwidth", "100"], "--bandwidth is for the simulator"),
        (["--model", "synthetic"], "is for the simulator"),
        (["--schedule", "tp-galaxy"], "it runs in the simulator only"),
        (["--repeats", "0"], "--repeats is 0"),
        ([CLUSTER, "--repeats", "2"], "--repeats is for runs in real time"),
        ([CLUSTER, "--workers", "host:1"], "--workers is for runs in real time"),
        (["--workers", "host:1", "--stages", "2"], "give one of --stages, --workers and --cluster"),
        (["--no-prune"], "--no-prune is for the simulator"),
        (["--tree-depth", "0"], "depth is 0"),
        (["--temperatures", "warm"], "is no comma list of numbers"),
        (["--temperatures", "0,0.0"], "names one twice"),
        (["--temperatures", "-1"], "temperature is -1.0"),
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--out", "{file}"], "cannot make the directory"),
        (["--trace", "/no/such/place/trace.json"], "cannot write"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_users_mistake_in_bench_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "results")]
    done = run("bench", *(argument.format(file=file) for argument in arguments), *out)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and done.err.count("\n") == 1, done.err


# --- names ---


def test_help_names_all_schedules(run: Run) -> None:
    assert ", ".join((AUTO, *SCHEDULES)) == SCHEDULE_NAMES
    assert ", ".join(ABLATIONS) == ABLATION_NAMES
    for command in ("generate", "simulate", "bench"):
        text = " ".join(run(command, "--help").out.replace("│", " ").split())
        names = SCHEDULES if command == "generate" else (*SCHEDULES, *ABLATIONS, *TENSOR_PARALLEL)
        assert all(name in text for name in names), command


def test_built_in_prompts_are_short_and_differ() -> None:
    assert len(set(BUILT_IN_PROMPTS)) == len(BUILT_IN_PROMPTS) == 8
    assert all(0 < len(prompt) < 400 for prompt in BUILT_IN_PROMPTS)
