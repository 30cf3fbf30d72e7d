"""The picture of the house is true, and nothing in it grows too long."""

from __future__ import annotations

from house import OURS, PAGE, diagram, long_files, long_functions, page_with

LONG = [*long_functions(*OURS), *long_files(*OURS)]

# What is longer all the same, and what is to become of it.
EXCEPTIONS = {
    "src/flowspec/engine/engine.py Engine.__init__": "loads, launches and measures; these are steps of a pipeline",
    "src/flowspec/request/generation.py Generation.__init__": "says what each of its fields is; some belong together",
    "src/flowspec/emulation/simulator.py": "places and the run of an experiment; two modules",
    "src/flowspec/engine/engine.py": "bring-up and the loop; two modules",
    "src/flowspec/request/generation.py": "a request's state and the verbs of schedules; two modules",
    "src/flowspec/wire/messages.py": "messages and their codec; two modules",
    "src/flowspec/worker/actor.py": "requests of a worker and its loop; two modules",
}


def test_the_picture_shows_what_is_imported_now() -> None:
    assert PAGE.read_text(encoding="utf-8") == page_with(diagram()), "run python -m tests.house --write"


def test_nothing_is_too_long() -> None:
    assert not [str(long) for long in LONG if long.place not in EXCEPTIONS], "split them"


def test_every_exception_is_needed() -> None:
    assert not EXCEPTIONS.keys() - {long.place for long in LONG}, "take them out of the table above"
