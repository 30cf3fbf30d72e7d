"""Every command and every block of code in README.md and docs/ is run, in a small size, or the test says that it knows
no way to. The places that the text names (`./Llama-3.2-3B`, `./texts`, ...) are made in a folder for it.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import Run
from flowspec.cluster.device_list import DeviceList
from flowspec.toml_table import Table
from flowspec.train.hints import HintRecipe
from flowspec.train.windows import DraftRecipe
from house import LEVELS, diagram
from logged_process import LoggedProcess
from tiny_eagle3 import write_eagle3
from tiny_models import make_checkpoint, make_draft_head, write_target_and_text
from tiny_mtp import write_mtp

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TIMEOUT_S = 120

FIGURES = ROOT / "docs" / "RESULTS.md"
RUN_SMALL_BY = {
    "rivals.py": "bench/test_benchmarks_gguf.py",  # the scripts whose figures it has, the simulated ones apart
    "chaos.py": "bench/test_benchmarks_chaos.py",
    "simulated_chaos.py": "bench/test_benchmarks_chaos.py",
    "demo_speed.py": "test_demo.py",
    "exactness.py": "bench/test_benchmarks_gguf.py",
    "encryption.py": "bench/test_benchmarks_encryption.py",
    "fuzz.py": "bench/test_benchmarks_fuzz.py",
    "recovery.py": "bench/test_benchmarks_chaos.py",
    "kernels.py": "bench/test_benchmarks_kernels.py",
    "overhead.py": "test_demo.py",
    "stage_memory.py": "model/test_loader.py",
    "draft_dtype.py": "test_demo.py",
}

# What stands for what the text says.
REPLACED = {
    "/models/llama": "Llama-3.2-3B",
}
WORKERS, SERVER = ("192.168.1.21:7070", "192.168.1.22:7070"), "127.0.0.1:8000"  # on any free port
SMALL = {"--max-new-tokens": "8", "--num-prompts": "1", "--tokens": "512", "--repeats": "1", "--time-scale": "4"}
ADDED = {
    "generate": {"--max-new-tokens": "8"},
    "simulate": {"--max-new-tokens": "8", "--num-prompts": "1", "--jobs": "1"},
    "bench": {"--max-new-tokens": "8", "--num-prompts": "1", "--temperatures": "0"},
    "bench clusters": {"--max-new-tokens": "8", "--num-prompts": "1", "--temperatures": "0", "--jobs": "1"},
    "emulate": {"--max-new-tokens": "4", "--num-prompts": "1", "--schedule": "flow", "--time-scale": "4"},
    "chat": {"--max-new-tokens": "8"},
    "demo": {"--max-new-tokens": "8", "--model": "demo"},
    "serve": {"--port": "0"},
}


@dataclass(frozen=True)
class Block:
    """A fenced block, or what stands between single quotes of code."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.text.split())[:60]}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page.name, text.count("\n", 0, fence.start()) + 1, fence[1], fence[2])
    prose = re.sub(r"^```.*?^```$", lambda fence: "\n" * fence[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for code in re.finditer(r"`([^`]+)`", prose):
        if re.match(r"(flowspec|python|make|pip|pipx|uv|\.) ", code[1]):
            yield Block(page.name, prose.count("\n", 0, code.start()) + 1, "sh", code[1])


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands() -> list[Block]:
    """Each once, in the order of the pages."""
    found: dict[str, Block] = {}
    for block in ALL_BLOCKS:
        if block.language == "sh":
            for place, line in enumerate(block.text.splitlines()):
                command = " ".join(shlex.split(line, comments=True))
                found.setdefault(command, Block(block.page, block.line + place, "sh", line))
    return [block for command, block in found.items() if command]


# --- what the commands find ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the text speaks of."""
    place = tmp_path_factory.mktemp("place")
    for name in ("clusters", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    make_checkpoint(place / "Llama-3.2-3B", "llama", num_hidden_layers=28)
    make_draft_head(place / "EAGLE-head")
    make_checkpoint(place / "Llama-tiny", "llama", num_hidden_layers=2)
    write_eagle3(place / "EAGLE-3-head")
    for name in ("MiMo-7B-RL", "MiMo-7B-RL-AWQ"):
        make_checkpoint(place / name, "mimo")
    write_mtp(place / "MiMo-7B-RL-AWQ", num_layers=0)
    (place / "prompt.txt").write_text("t1 t4 t2")
    (place / "made").mkdir()
    target, text = write_target_and_text(place / "made")
    target.rename(place / "my-model")
    (place / "texts").mkdir()
    text.rename(place / "texts" / "text.txt")
    return place


class Running:
    """A command that goes on until it is told to end, and then has done its work."""

    def __init__(self, place: Path, arguments: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        self._running = LoggedProcess(arguments, "end it with Ctrl-C", cwd=place, env=environment)

    def await_up(self) -> str:
        """The address that it listens on."""
        assert self._running.comes_up(TIMEOUT_S), self._running.log
        found = re.search(r"//(127\.0\.0\.1:\d+)", self._running.log)
        assert found is not None, self._running.log
        return found[1]

    def end(self) -> None:
        self._running.process.send_signal(signal.SIGTERM)
        assert self._running.wait(30) == 0, self._running.log


class House:
    """Runs the commands of the text, one after the other, and keeps what goes on in the background."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.background: dict[str, Running] = {}
        self._addresses: dict[str, str] = {}  # of those, by what the text calls them

    def small(self, words: list[str]) -> list[str]:
        """The same command, with what stands for what it names, in a small size."""
        for old, new in {**REPLACED, **self._addresses}.items():
            words = [word.replace(old, new) for word in words]
        name = "bench clusters" if " ".join(words).startswith("bench clusters/") else words[0]
        added = ADDED.get(name, {})
        for option, value in {**SMALL, **added}.items():
            if option in words:
                words[words.index(option) + 1] = value
            elif option in added:
                words = [*words, option, value]
        return words

    def start(self, words: list[str]) -> None:
        """Once: the same command goes on."""
        command = shlex.join(words)
        if command not in self.background:
            address = words[words.index("--listen") + 1] if "--listen" in words else SERVER
            if "worker" in words and address in self._addresses:
                return  # it is there, from a command with other options
            any_port = [word.replace(address, "127.0.0.1:0") for word in self.small(words)]
            if "--join" in any_port:  # worker/test_joining.py does; here is one machine, and its workers need no keys
                at = any_port.index("--join")
                any_port = any_port[:at] + any_port[at + 2 :]
            self.background[command] = Running(self.place, any_port)
            self._addresses[address] = self.background[command].await_up()

    def end(self) -> None:
        for running in self.background.values():
            running.end()


@pytest.fixture(scope="module")
def house(place: Path) -> Iterator[House]:
    house = House(place)
    yield house
    house.end()


# --- how a command is tested ---

Rule = Callable[["House", Run, list[str]], None]


def run_flowspec(house: House, run: Run, words: list[str]) -> None:
    """In this process; ``< FILE`` is what it reads."""
    stdin = "t1 t4\n"
    if "<" in words:
        stdin = (house.place / words.pop(words.index("<") + 1)).read_text()
        words.remove("<")
    if WORKERS[0] in " ".join(words):  # "install flowspec on each, and start a worker"
        for address in WORKERS:
            house.start(["worker", "--listen", address])
    if "--url" in words:
        house.start(documented("flowspec serve"))
    done = run(*house.small(words), stdin=stdin)
    too_slow = words[0] == "emulate" and "cannot keep up" in done.err  # other work on this machine decides over that
    assert done.code == 0 or too_slow, done.err
    assert done.out or too_slow or words[0] == "train-draft"


def documented(start: str) -> list[str]:
    """The arguments of the first command that begins so and has options."""
    texts = (shlex.split(block.text, comments=True) for block in commands())
    return next(words[1:] for words in texts if shlex.join(words).startswith(start + " --"))


def run_help(house: House, run: Run, words: list[str]) -> None:
    name = [word for word in words if not word.startswith("-")]
    assert run(*name, "--help").code == 0


def check_discover(house: House, run: Run, words: list[str]) -> None:
    """worker/test_discovery.py runs them: the network here is none of theirs."""
    command = words[: 2 if words[0] == "cluster" else 1]
    assert "--discover" in run(*command, "--help").out


def start_in_background(house: House, run: Run, words: list[str]) -> None:
    house.start(words)


def check_script(house: House, run: Run, words: list[str]) -> None:
    """The script is there and knows the arguments. It takes minutes: where figures are its own, a test has it small."""
    script, *arguments = words
    if Path(script).name in RUN_SMALL_BY:
        assert Path(script).name in (ROOT / "tests" / RUN_SMALL_BY[Path(script).name]).read_text(encoding="utf-8")
    elif script in FIGURES.read_text(encoding="utf-8"):
        pytest.fail(f"{FIGURES.name} has figures of {script}, which no test runs in a small size; write one")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        run_script(script, *arguments, "--help")
    assert end.value.code == 0 and "usage:" in printed.getvalue()


def run_results(house: House, run: Run, words: list[str]) -> None:
    """Each section on one cluster, from a prompt or two of two tokens; rivals are searched over few settings."""
    script, *arguments = words
    sizes = ("--num-prompts", "1", "--max-new-tokens", "2", "--jobs", "1")  # instead of what the command says
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))
        lab, tuning, page = (importlib.import_module(f"simulated.{name}") for name in ("lab", "tuning", "page"))
        nano = lab.cluster(lab.NANO_7B)
        for name in ("block", "fair", "flow", "rivals", "whole"):
            patch.setattr(f"simulated.{name}.all_clusters", lambda: [nano])
        for name in ("flow", "rivals"):
            patch.setattr(f"simulated.{name}.cluster", lambda name: nano)
        for table in ("rivals.DRAWN", "sensitivity.CLUSTERS"):
            patch.setattr(f"simulated.{table}", (lab.NANO_7B,))
        for space in ("SPACES", "BLOCK_SPACES"):
            whole = getattr(tuning, space)
            first = {name: {setting: values[:1] for setting, values in own.items()} for name, own in whole.items()}
            patch.setattr(tuning, space, first)
        patch.setattr(tuning, "NUM_TOKENS", 4)
        patch.setattr(tuning, "NUM_TEXTS", 1)
        if arguments == ["--only", "NAME"]:  # stands for each that has no command of its own
            own = {
                shlex.split(block.text, comments=True)[3] for block in commands() if f"{script} --only" in block.text
            }
            sections = [name for name in page.SECTIONS if name not in own]
        else:
            sections = arguments[1:2]
            assert arguments[0] == "--only" and arguments[2:] in ([], ["--num-prompts", arguments[-1]])
        out = house.place / "figures"
        run_script(script, *(word for name in sections for word in ("--only", name)), *sizes, "--out", str(out))
    written = (out / "RESULTS.md").read_text(encoding="utf-8")
    for name in sections:
        section = written.partition(f"<!-- section: {name} -->\n### {page.SECTIONS[name][0]}\n")[2]
        assert re.search(r"^(\| .* \||!\[.*\))$", section.partition("<!-- section: ")[0], re.MULTILINE), name


def run_script(script: str, *arguments: str) -> None:
    """In this process."""
    argv, path = sys.argv, sys.path
    try:
        sys.argv, sys.path = [script, *arguments], [str((ROOT / script).parent), *path]
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path


def run_module(house: House, run: Run, words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0 and done.stdout, done.stderr


def check_target(house: House, run: Run, words: list[str]) -> None:
    """make knows it; nothing is made."""
    assert subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, timeout=TIMEOUT_S).returncode == 0


def check_install(house: House, run: Run, words: list[str]) -> None:
    """Nothing is installed: what would be is looked at."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[-1] in (".", *(f".[{extra}]" for extra in project["optional-dependencies"]))
    module, _, function = project["scripts"]["flowspec"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def check_activation(house: House, run: Run, words: list[str]) -> None:
    assert words == [".venv/bin/activate"] and "VENV := .venv\n" in (ROOT / "Makefile").read_text()


RULES: dict[str, Rule] = {
    r"flowspec .*--discover": check_discover,
    r"flowspec (serve|worker) .*--(model|listen)": start_in_background,
    r"flowspec models fetch ": run_help,  # nothing is fetched
    r"flowspec cluster ": run_help,  # nobody joins
    r"flowspec [\w-]+$|flowspec .*--help$": run_help,  # a mention of a command
    r"flowspec ": run_flowspec,
    r"python benchmarks/results.py": run_results,
    r"python benchmarks/": check_script,
    r"python -m tests\.": run_module,
    r"make [\w-]+$": check_target,
    r"(pip|pipx|uv tool) install ": check_install,
    r"\. ": check_activation,
}


@pytest.mark.parametrize("block", commands(), ids=str)
def test_a_command_works_as_it_is_written(
    house: House, run: Run, monkeypatch: pytest.MonkeyPatch, block: Block
) -> None:
    monkeypatch.chdir(house.place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # worker processes run this very code, from wherever they start
    monkeypatch.setattr("flowspec.train.hints.HintRecipe", lambda: HintRecipe(rank=4, num_tokens=512))
    short = {"context_len": 64, "prompt_len": 16, "generation_batch": 8}
    monkeypatch.setattr("flowspec.train.draft.DraftRecipe", lambda: DraftRecipe(**short))
    words = shlex.split(block.text, comments=True)
    command = " ".join(words)
    for pattern, rule in RULES.items():
        if re.match(pattern, command):
            return rule(house, run, words[1:])
    pytest.fail(f"{block}: no rule says how to test this command")


@pytest.mark.parametrize("block", [block for block in ALL_BLOCKS if block.language != "sh"], ids=str)
def test_a_block_of_code_works_as_it_is_written(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], block: Block
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    match block.language:
        case "python":
            exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
            assert capfd.readouterr().out
        case "ini":
            unit = configparser.ConfigParser(interpolation=None)
            unit.optionxform = str  # type: ignore[assignment]
            unit.read_string(block.text)
            assert set(unit.sections()) == {"Unit", "Service", "Install"}
            command = shlex.split(unit["Service"]["ExecStart"])
            assert command[0].endswith("/flowspec") and run(*command[1:], "--help").code == 0
        case "toml":
            assert DeviceList.of(Table.parse(block.text, str(block))).addresses
        case "rooms":
            assert LEVELS, "it is tests/house.py that reads it"
        case "mermaid":
            assert block.text in diagram(), "it is tests/house.py that draws it"
        case "":
            assert "--->" in block.text, "a picture; commands are in blocks of sh"
        case language:
            pytest.fail(f"{block}: no rule says how to test {language}")


def test_the_runner_finds_what_there_is_to_run() -> None:
    texts = [block.text for block in commands()]
    for start in ("pip install", "flowspec generate", "flowspec serve --model", "flowspec worker", "make test"):
        assert any(text.startswith(start) for text in texts), start
    assert {block.page for block in ALL_BLOCKS} == {page.name for page in PAGES if "`flowspec " in page.read_text()} | {
        page.name for page in PAGES if "```" in page.read_text()
    }
