"""The picture of the house is true, and nothing in it grows too long."""

from __future__ import annotations

from house import OURS, PAGE, diagram, long_files, long_functions, page_with


def test_the_picture_shows_what_is_imported_now() -> None:
    assert PAGE.read_text(encoding="utf-8") == page_with(diagram()), "run python -m tests.house --write"


def test_nothing_is_too_long() -> None:
    assert not [str(long) for long in (*long_functions(*OURS), *long_files(*OURS))], "split them"
