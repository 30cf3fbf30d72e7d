"""``lockstep`` and ``chunked`` do what the paper's public code does, token by token and row by row.

``published_sequences.json`` is what that code did with the demo pair on ten prompts, numbers only;
``benchmarks/published_sequences.py`` says its format. Other weights of the demo pair need another file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "published_sequences.py"
RECORDS = json.loads((Path(__file__).parent / "published_sequences.json").read_text())


@lru_cache
def load_script() -> Any:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = script  # where its dataclasses look for their types
    spec.loader.exec_module(script)
    return script


@lru_cache
def load_pair() -> Any:
    return load_script().Pair()


@pytest.mark.parametrize(
    ("schedule", "index"),
    [
        *(("lockstep", index) for index in range(len(RECORDS))),
        *(("chunked", index) for index in range(0, len(RECORDS), 3)),
    ],
)
def test_a_schedule_verifies_and_sends_what_the_published_code_does(schedule: str, index: int) -> None:
    script, record = load_script(), RECORDS[index]
    own = script.ours(load_pair(), schedule, record["prompt_ids"])
    their = script.theirs(record, schedule, len(own.segment_rows))
    assert own.verified_steps == their.verified_steps
    assert own.segment_rows == their.segment_rows
    assert sum(own.verified_steps) >= 60 and len(own.segment_rows) >= len(own.verified_steps)


def test_the_records_have_the_cases_that_matter() -> None:
    lockstep = [record["lockstep"] for record in RECORDS]
    rows = [num_rows for one in lockstep for num_rows in one["segment_rows"]]
    assert 0 in rows, "steps that verified nothing"
    assert any(0 < num_rows < 16 for num_rows in rows), "most of a new tree was in flight"
    assert 64 in rows, "nothing of a new tree was in flight"
    assert any(one["segment_rows"].count(17) > 1 for one in lockstep), "rounds that ended"


def test_the_benchmark_says_how_far_they_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, script, pair = tmp_path / "records.json", load_script(), load_pair()
    monkeypatch.setattr(script, "Pair", lambda: pair)

    def run(records: list[dict[str, Any]]) -> tuple[int, str]:
        path.write_text(json.dumps(records))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path), "--prompts", "1"])
        with pytest.raises(SystemExit) as end:
            script.main()
        return int(end.value.code or 0), capsys.readouterr().out

    code, table = run(RECORDS)
    assert code == 0 and table.count("1 of 1") == 4
    wrong = json.loads(json.dumps(RECORDS[:1]))
    wrong[0]["lockstep"]["segment_rows"][3] += 1
    code, table = run(wrong)
    assert code == 1 and table.count("1 of 1") == 3 and table.count("0 of 1") == 1


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (None, (), "cannot read {path}: No such file or directory"),
        ("no json", (), "{path} is no JSON file"),
        ("{}", (), "{path} is no list of objects with chunked, lockstep, prompt_ids"),
        ("[]", (), "{path} is no list of objects"),
        ('[{"prompt_ids": [1]}]', (), "{path} is no list of objects"),
        ("[]", ("--prompts", "0"), "--prompts is 0; it must be at least 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    more: tuple[str, ...],
    message: str,
) -> None:
    path, script = tmp_path / "records.json", load_script()
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path), *more])
    with pytest.raises(SystemExit) as end:
        script.main()
    printed = capsys.readouterr()
    assert (end.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert message.format(path=path) in printed.err
