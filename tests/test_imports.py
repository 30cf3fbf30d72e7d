"""The import rules: modules import only from lower levels, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "flowspec"

# Lower numbers are imported by higher ones. A longer name overrules its package's.
LEVELS = {
    "errors": 0, "checked": 0, "core": 0, "config": 0, "records": 0,
    "tree": 1, "text": 1, "chat_template": 1, "noise": 1, "filters": 1, "sampling": 1, "messages": 1,
    "cluster": 1, "device_list": 1,
    "transport": 2, "model": 2,
    "draft.base": 3, "generation": 3, "slot_budget": 3, "draft": 3, "schedule": 3,
    "worker": 4, "driver": 4, "measure": 4,
    "virtual_time": 5, "paced": 5, "worker_process": 5, "launch": 5, "engine": 5, "llm": 5,
    "simulator": 5, "emulator": 5,
    "train": 6, "bench": 6, "server": 6, "talk": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip

FORBIDDEN = {
    "worker": {"driver", "draft", "schedule", "generation"},
    "worker_process": {"driver", "draft", "schedule", "generation"},
    "driver": {"worker"},
    "measure": {"driver", "draft", "schedule", "generation", "transport"},
    "transport": {"model"},
    "model": {"messages", "transport"},
}

# Third-party libraries and the modules that alone may import them.
CONFINED = {
    "zmq": {"transport", "launch", "worker_process"},
    "ray": {"launch"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "pydantic": {"server"},
    "typer": {"cli"},
    "prompt_toolkit": {"cli"},
    "httpx": {"talk.server"},
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


def level(name: str) -> int:
    while name not in LEVELS:
        assert "." in name, f"{name} has no level; add it to the order"
        name = name.rpartition(".")[0]
    return LEVELS[name]


def may_import(name: str, inner: str) -> bool:
    """Downwards, within a package, or between neighbours of the same level, in the order of ``LEVELS``."""
    order = list(LEVELS)
    if level(inner) != level(name):
        return level(inner) < level(name)
    key, inner_key = (next(k for k in (n, n.partition(".")[0]) if k in LEVELS) for n in (name, inner))
    return order.index(inner_key) <= order.index(key)


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


def test_plain_types_need_no_torch() -> None:
    for name, path in modules():
        if level(name) == 0:
            assert not any(i.partition(".")[0] in ("torch", "numpy", "transformers") for i in imports(path)), name


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "ray", "fastapi", "zmq", "numpy", "typer"]
    code = f"import flowspec, sys; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
