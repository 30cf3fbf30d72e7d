"""The import rules: modules import only from lower levels, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "flowspec"


def read_levels() -> dict[str, tuple[int, int]]:
    """Each room's level, and its place in it, from the table of docs/DESIGN.md."""
    text = (Path(__file__).parent.parent / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    table = text.partition("```rooms\n")[2].partition("```")[0]
    rows = [line.split() for line in table.splitlines()]
    return {room: (int(row[0]), place) for row in rows for place, room in enumerate(row[1:])}


LEVELS = read_levels()

FORBIDDEN = {
    "worker": {"driver", "draft", "schedule", "request"},
    "driver": {"worker"},
    "wire": {"model"},
    "model": {"wire"},
}

# Third-party libraries and the rooms that alone may import them.
CONFINED = {
    "zmq": {"wire", "cluster", "worker"},
    "ray": {"cluster"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "pydantic": {"server"},
    "typer": {"cli"},
    "prompt_toolkit": {"cli"},
    "httpx": {"talk.remote"},
    "matplotlib": {"bench.plots"},
    "transformers": {"model", "train", "engine"},
    "huggingface_hub": {"model"},
}


def modules() -> list[tuple[str, Path]]:
    names = [
        (".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]
    return [(name, path) for name, path in names if name != "__init__"]


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, inside functions and type-checking blocks too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def room(name: str) -> str:
    """The folder, or the module of the root."""
    found = name.partition(".")[0]
    assert found in LEVELS, f"{found} has no level; add it to the table in docs/DESIGN.md"
    return found


def level(name: str) -> int:
    return LEVELS[room(name)][0]


def may_import(name: str, inner: str) -> bool:
    """From lower levels, from rooms further left on the same one, and within a room."""
    return LEVELS[room(inner)] <= LEVELS[room(name)]


def is_within(name: str, owners: set[str]) -> bool:
    return any(name == owner or name.startswith(owner + ".") for owner in owners)


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_modules_import_only_what_they_may(name: str, path: Path) -> None:
    for imported in imports(path):
        top = imported.partition(".")[0]
        if top == "flowspec":
            inner = imported.removeprefix("flowspec").lstrip(".")
            if not inner:
                continue  # the version
            assert may_import(name, inner), f"{name} (level {level(name)}) imports {inner} (level {level(inner)})"
            for owner, forbidden in FORBIDDEN.items():
                if is_within(name, {owner}):
                    assert not is_within(inner, forbidden), f"{name} must not import {inner}"
        elif top in CONFINED:
            assert is_within(name, CONFINED[top]), f"{name} imports {top}, which belongs in {CONFINED[top]}"


def test_no_room_has_a_circle() -> None:
    paths = dict(modules())
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        inner = {imported.removeprefix("flowspec.") for imported in imports(path)} & paths.keys()
        graph[name] = {other for other in inner if other != name and room(other) == room(name)}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_plain_types_need_no_torch() -> None:
    for name, path in modules():
        if level(name) == 0:
            assert not any(i.partition(".")[0] in ("torch", "numpy", "transformers") for i in imports(path)), name


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "ray", "fastapi", "zmq", "numpy", "typer"]
    code = f"import flowspec, sys; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
