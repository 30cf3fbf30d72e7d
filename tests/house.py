"""The house: its rooms, which of them import which, and what in it has grown too long.

    python -m tests.house [--write]    prints all of it; --write also puts the picture into docs/DESIGN.md

It reads the source as text and imports none of it. The rooms and their levels are the table of docs/DESIGN.md.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "flowspec"
COMMANDS = PACKAGE / "cli"
PAGE = ROOT / "docs" / "DESIGN.md"
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->\n"

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
OURS, TESTS = ("src", "benchmarks"), ("tests",)


def read_levels() -> dict[str, tuple[int, int]]:
    """Each room's level, and its place in it, from the table of docs/DESIGN.md."""
    table = PAGE.read_text(encoding="utf-8").partition("```rooms\n")[2].partition("```")[0]
    rows = [line.split() for line in table.splitlines()]
    return {room: (int(row[0]), place) for row in rows for place, room in enumerate(row[1:])}


LEVELS = read_levels()


def modules() -> dict[str, Path]:
    """The modules of the package by their names within it."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: path for name, path in zip(names, paths, strict=True) if name != "__init__"}


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, inside functions and type-checking blocks too."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def inner_imports(path: Path) -> set[str]:
    """Those from the package, by their names within it; the package itself, which is its version, is none."""
    return {name.removeprefix("flowspec.") for name in imports(path) if name.startswith("flowspec.")}


def room(name: str) -> str:
    """The folder, or the module of the root."""
    found = name.partition(".")[0]
    assert found in LEVELS, f"{found} has no level; add it to the table in docs/DESIGN.md"
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# The picture.


def sources() -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    found: dict[str, set[str]] = {name: set() for name in LEVELS}
    for name, path in modules().items():
        found[room(name)] |= {room(inner) for inner in inner_imports(path)} - {room(name)}
    return found


def direct_sources() -> dict[str, list[str]]:
    """Of the rooms that each room imports from, those that none of the others leads to."""
    found = sources()
    reached: dict[str, set[str]] = {}
    for name in sorted(LEVELS, key=LEVELS.__getitem__):  # so what a room imports from comes before it
        reached[name] = found[name].union(*(reached[source] for source in found[name]))
    return {
        name: sorted(inner - set().union(*(reached[source] for source in inner)), key=LEVELS.__getitem__)
        for name, inner in found.items()
    }


def diagram() -> str:
    """The levels, the highest one above, and an arrow from each room to those it imports from, in Mermaid."""
    lines = ["flowchart TD"]
    for level in sorted({level for level, _ in LEVELS.values()}, reverse=True):
        rooms = [name for name, (its_level, _) in LEVELS.items() if its_level == level]
        lines += [f"  subgraph level{level}[level {level}]", f"    {' & '.join(rooms)}", "  end"]
    for name, inner in reversed(direct_sources().items()):
        lines += [f"  {name} --> {' & '.join(inner)}"] if inner else []
    return "\n".join(["```mermaid", *lines, "```", ""])


def page_with(picture: str) -> str:
    """The page with this picture between its markers."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE} has no {BEGIN.strip()} ... {END.strip()}; add the two lines"
    return before + begin + picture + end + after


# What is long.


@dataclass(frozen=True)
class Long:
    num_lines: int
    place: str  # a file, or a file and a function in it

    def __str__(self) -> str:
        return f"{self.num_lines:5} {self.place}"


def long_functions(*folders: str) -> list[Long]:
    """Longest first. Of a command only the body counts: its signature declares options."""
    found = [
        Long(num_lines, f"{path.relative_to(ROOT).as_posix()} {name}")
        for path in files(folders)
        for name, node in functions(parsed(path))
        if (num_lines := last_line(node) - first_line(node, path) + 1) > MAX_FUNCTION_LINES
    ]
    return sorted(found, key=lambda long: (-long.num_lines, long.place))


def long_files(*folders: str) -> list[Long]:
    found = [
        Long(num_lines, path.relative_to(ROOT).as_posix())
        for path in files(folders)
        if (num_lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    ]
    return sorted(found, key=lambda long: (-long.num_lines, long.place))


def files(folders: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions with their full names, those in classes and in functions too."""
    for node in ast.iter_child_nodes(tree):
        name = owner
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{owner}.{node.name}".lstrip(".")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from functions(node, name)


def first_line(node: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> int:
    return node.body[0].lineno if path.is_relative_to(COMMANDS) else node.lineno


def last_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.house", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the picture into docs/DESIGN.md")
    if parser.parse_args().write:
        PAGE.write_text(page_with(diagram()), encoding="utf-8")
    print(diagram())
    for folders in (OURS, TESTS):
        where = " and ".join(f"{folder}/" for folder in folders)
        for what, found in (
            (f"Functions of more than {MAX_FUNCTION_LINES} lines in {where}", long_functions(*folders)),
            (f"Files of more than {MAX_FILE_LINES} lines in {where}", long_files(*folders)),
        ):
            print(f"{what}: {'' if found else 'none'}", *found, sep="\n")


if __name__ == "__main__":
    main()
