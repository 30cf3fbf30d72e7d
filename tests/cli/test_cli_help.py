"""What the command line says of itself, and how its figures fit a terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Run
from flowspec.cli import terminal
from flowspec.cli.groups import flag
from flowspec.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_SAMPLING,
    DEFAULT_STAGE_OPTIONS,
    ModelOptions,
    SamplingOptions,
)
from flowspec.cli.terminal import TerminalProgress, fitted
from flowspec.config import PUBLISHED_TREE, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import SamplingParams

CLUSTER = str(Path(__file__).parents[2] / "clusters" / "7b-nano-150m.toml")
COMMANDS = ("generate", "demo", "chat", "serve", "worker", "simulate", "bench", "emulate", "train-draft", "models")


def options_of(text: str) -> dict[str, str]:
    """Name -> what the help says of it."""
    found = re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*?)(?=^  (?:-\w, )?--|\Z|^\S)", text, re.MULTILINE | re.DOTALL)
    return {name: " ".join(rest.split()) for name, rest in found}


def test_help_loses_nothing_and_fits_80_columns(run: Run) -> None:
    for command in ((), *((name,) for name in COMMANDS)):
        done = run(*command, "--help")
        assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80
        assert "<bool>" not in done.out and "…" not in done.out
        assert not re.search(r"[a-z]\.\.\.", done.out), "no sentence is cut"
    assert "[driver.ours]" in run("simulate", "--help").out, "brackets are text"
    assert "--install-completion" in run("--help").out


def names(group: object) -> set[str]:
    return {flag(name) for name in vars(group)}


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_every_command_that_runs_a_model_has_the_same_options(run: Run, command: str) -> None:
    shown = options_of(run(command, "--help").out)
    everything = names(DEFAULT_MODEL) | names(DEFAULT_STAGE_OPTIONS)
    everything |= names(DEFAULT_SAMPLING) if command != "serve" else set()
    assert everything <= shown.keys()
    generate = options_of(run("generate", "--help").out)
    without_default = {name: re.sub(r" ?\[default: .*\]$", "", shown[name]) for name in everything}
    assert without_default == {name: re.sub(r" ?\[default: .*\]$", "", generate[name]) for name in everything}


def test_an_option_has_one_name_wherever_it_is(run: Run) -> None:
    by_command = {command: options_of(run(command, "--help").out) for command in COMMANDS}
    for command in ("simulate", "bench", "emulate"):
        assert {"--draft", "--draft-dtype", "--seed", "--num-prompts"} <= by_command[command].keys()
    assert names(DEFAULT_MODEL) | names(DEFAULT_STAGE_OPTIONS) <= by_command["bench"].keys()
    assert names(DEFAULT_STAGE_OPTIONS) | names(DEFAULT_SAMPLING) <= by_command["demo"].keys()


def test_tree_options_are_of_flow_and_leave_the_published_schedules_as_they_are() -> None:
    config = ModelOptions(tree_top_k=3, tree_depth=4, tree_size=20, min_probability=0.1, segment_len=5).arguments()
    tree, pipeline = TreeConfig(3, depth=4, max_depth=8, size=20, min_probability=0.1), PipelineConfig(segment_len=5)
    assert config["schedule_config"] == ScheduleConfig(flow=tree, pipeline=pipeline)
    assert config["schedule_config"].lockstep.tree == PUBLISHED_TREE


def test_completion_is_offered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_FLOWSPEC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "flowspec generate --draft-")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run().out.split() == ["--draft-dtype", "--draft-layers", "--draft-check", "--draft-worker"]


@pytest.mark.parametrize("option", ["--int8-wire", "--partition", "--min-probability", "--cluster"])
def test_a_chat_with_a_server_refuses_what_only_the_server_can_decide(run: Run, option: str) -> None:
    value = {"--int8-wire": [], "--min-probability": ["0.1"]}.get(option, ["x"])
    done = run("chat", "--url", "http://127.0.0.1:1", option, *value)
    assert done.code == 2 and f"{option} is the server's matter" in done.err


def test_sampling_options_are_the_fields_of_sampling_params(run: Run, checkpoint_dir: Callable[[str], Path]) -> None:
    values = (6, 0.5, 0.9, 7, 0.1, 3, 0.2, 0.3, 1.1, ["a", "b"], ["5:-1.5"], True)
    params = SamplingParams(**SamplingOptions(*values).given())
    assert params == SamplingParams(
        6, 0.5, 0.9, 7, 3, True, 0.1, 0.2, 0.3, 1.1, logit_bias=((5, -1.5),), stop=("a", "b")
    )
    assert DEFAULT_SAMPLING.given() == {}
    done = run(
        "generate", "t1 t4 t2", "--model", str(checkpoint_dir("llama")), "--stages", "1", "--draft", "none",
        "--max-new-tokens", "6", "--logit-bias", "7:100",
    )  # fmt: skip
    assert done.out.split() == ["t7"] * 6


# --- figures ---


def width(cells: terminal.Cells) -> int:
    return sum(max(len(cell) for cell in column) for column in zip(*cells, strict=True)) + 3 * (len(cells[0]) - 1)


def test_a_table_that_is_too_wide_is_turned_and_one_that_is_still_is_cut_between_its_columns() -> None:
    cells = [["schedule", "tokens/s", "restarts"], ["ar", "1.00", "0"], ["flow", "2.50", "3"]]
    assert fitted(cells, 80) == [cells]
    turned = [("schedule", "ar", "flow"), ("tokens/s", "1.00", "2.50"), ("restarts", "0", "3")]
    assert fitted(cells, width(turned)) == [turned]
    first, second = fitted(cells, width(turned) - 1)
    assert [row[0] for row in first] == [row[0] for row in second] == ["schedule", "tokens/s", "restarts"]
    assert [row[1:] for row in first] == [("ar",), ("1.00",), ("0",)]
    assert [row[1:] for row in second] == [("flow",), ("2.50",), ("3",)]


@pytest.mark.parametrize("columns", [80, 60, 200])
def test_figures_fit_the_terminal_and_none_is_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    small = ("--num-prompts", "1", "--max-new-tokens", "4", "--jobs", "1", "--schedule")
    names = "ar,serial,chunked,pipedec,lockstep,lockstep-no-score-order,flow,flow-no-late-binding"
    for command in (
        ("simulate", CLUSTER, *small, names),
        ("simulate", CLUSTER, *small, "flow", "--clients", "1,2"),
        ("bench", CLUSTER, *small, "ar,chunked,flow", "--temperatures", "0", "--sweep", "--out", str(tmp_path)),
    ):
        done = run(*command)
        assert done.code == 0, done.err
        lines = [line for line in done.out.splitlines() if not line.startswith(("driver costs", "figures and plots"))]
        assert max(map(len, lines)) <= columns and "…" not in done.out
        assert all(name in done.out.split() for name in command[command.index("--schedule") + 1].split(","))
    for heading in ("tokens/s by bandwidth, Mbps", "tokens/s by latency, ms", "tokens/s by stages"):
        assert heading in done.out, "the figures of the sweep are printed"


def test_plots_name_what_was_overridden(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, title, **style: titles.append(" ".join(title.split())))
    small = ("--num-prompts", "1", "--max-new-tokens", "8", "--jobs", "1", "--schedule", "ar,flow")
    overrides = ("--latency", "20", "--bandwidth", "300", "--stages", "2", "--tree-depth", "3", "--tree-size", "20")
    faults = ("--delay", "3", "--slow", "2:0.5:3", "--segment-len", "4")
    draw = ("--plot", str(tmp_path / "a.png"), "--timeline", str(tmp_path / "b.png"))
    assert run("simulate", CLUSTER, *small, *overrides, *faults, "--temperature", "0.5", *draw).code == 0
    for title in titles:
        for part in (
            "latency 20 ms", "bandwidth 300 Mbps", "2 stages", "temperature 0.5", "tree depth 3", "tree size 20",
            "messages late by up to 3 ms", "worker 2 3 times as slow from 0.5 s on", "segments of at most 4",
        ):  # fmt: skip
            assert part in title
    assert len(titles) == 2
    titles.clear()
    bench = ("bench", CLUSTER, *small, "--temperatures", "0", "--sweep", "--latency", "20", "--out", str(tmp_path))
    assert run(*bench).code == 0
    assert sum("latency 20 ms" in title for title in titles) == len(titles) - 1, "all but the one that varies it"


# --- progress ---


def test_long_work_says_a_line_now_and_then_in_a_pipe_and_short_work_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    progress = TerminalProgress(lambda: now)
    for second in range(26):
        now = float(second)
        progress("simulating", second / 26)
    progress.stop()
    captured = capsys.readouterr()
    assert captured.err == "flowspec: simulating: 38%\nflowspec: simulating: 77%\n" and not captured.out


@pytest.mark.parametrize(
    "command",
    [
        ("simulate", CLUSTER, "--num-prompts", "6", "--jobs", "1", "--schedule", "ar", "--max-new-tokens", "4"),
        ("generate", "import os", "--stages", "1", "--max-new-tokens", "8", "--json"),
        (
            "bench",
            "--stages",
            "1",
            "--schedule",
            "ar",
            "--num-prompts",
            "1",
            "--max-new-tokens",
            "4",
            "--temperatures",
            "0",
        ),
    ],
    ids=lambda command: command[0],
)
def test_every_long_command_reports_its_progress(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(terminal, "LINE_INTERVAL_S", 0.0)
    out = ("--out", str(tmp_path)) if command[0] == "bench" else ()
    done = run(*command, *out)
    assert done.code == 0, done.err
    assert re.search(r"^flowspec: (simulating|generating|temperature [01]): \d+%$", done.err, re.MULTILINE)


def loaded(code: str, *modules: str) -> str:
    """Those of the modules that a new Python has after it has run the code."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*(m for m in sys.argv[1:] if m in sys.modules))"]
    done = subprocess.run([*command, *modules], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "zmq", "httpx", "prompt_toolkit", "fastapi", "matplotlib")
    assert loaded("from flowspec.cli import main", *heavy) == ""


def test_simulating_without_a_real_model_loads_neither_transformers_nor_matplotlib() -> None:
    options = f"{CLUSTER!r}, '--max-new-tokens', '4', '--num-prompts', '1', '--schedule', 'ar,flow', '--jobs', '1'"
    code = f"from flowspec.cli.main import app; app(['simulate', {options}, '--json'], standalone_mode=False)"
    assert loaded(f"{code}; print()", "torch", "transformers", "matplotlib").splitlines()[-1] == "torch"
