"""The import rules: modules import only from lower levels, and heavy libraries stay where they belong."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from house import LEVELS, imports, inner_imports, modules, room

FORBIDDEN = {
    "worker": {"driver", "draft", "schedule", "request"},
    "driver": {"worker"},
    "wire": {"model"},
    "model": {"wire"},
}

# Third-party libraries and the rooms that alone may import them.
CODE = {f"model.{name}_code" for name in ("fetch", "float_tile", "team", "tile", "vector")}
CONFINED = {
    "zmq": {"wire", "cluster", "worker"},
    "ray": {"cluster"},
    "zeroconf": {"cluster.mdns"},
    "ifaddr": {"cluster.mdns"},
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
    "numba": {"model.compiled", *CODE},
    "llvmlite": CODE,
    "gguf": {"model"},
}


def level(name: str) -> int:
    return LEVELS[room(name)][0]


def may_import(name: str, inner: str) -> bool:
    """From lower levels, from rooms further left on the same one, and within a room."""
    return LEVELS[room(inner)] <= LEVELS[room(name)]


def is_within(name: str, owners: set[str]) -> bool:
    return any(name == owner or name.startswith(owner + ".") for owner in owners)


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=list(modules()))
def test_modules_import_only_what_they_may(name: str, path: Path) -> None:
    for inner in inner_imports(path):
        assert may_import(name, inner), f"{name} (level {level(name)}) imports {inner} (level {level(inner)})"
        for owner, forbidden in FORBIDDEN.items():
            if is_within(name, {owner}):
                assert not is_within(inner, forbidden), f"{name} must not import {inner}"
    for top in {imported.partition(".")[0] for imported in imports(path)} & CONFINED.keys():
        assert is_within(name, CONFINED[top]), f"{name} imports {top}, which belongs in {CONFINED[top]}"


def test_no_room_has_a_circle() -> None:
    paths = modules()
    graph = {
        name: {other for other in inner_imports(path) & paths.keys() - {name} if room(other) == room(name)}
        for name, path in paths.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_plain_types_need_no_torch() -> None:
    for name, path in modules().items():
        if level(name) == 0:
            assert not any(i.partition(".")[0] in ("torch", "numpy", "transformers") for i in imports(path)), name


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "ray", "fastapi", "zmq", "numpy", "typer"]
    code = f"import flowspec, sys; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
