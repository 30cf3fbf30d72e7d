"""What a log is told of others' mistakes."""

from __future__ import annotations

import logging

import pytest

from flowspec.complaints import Complaints


def test_complaints_are_few_and_say_how_many_there_were(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    complaints = Complaints(logging.getLogger("flowspec.test"), lambda: now[0])
    for number in range(1000):
        complaints.warn(f"number {number}")
    assert [record.getMessage() for record in caplog.records] == [f"number {number}" for number in range(10)]
    now[0] = 61.0
    complaints.warn("later")
    assert caplog.records[-1].getMessage() == "later (990 more such warnings were left out)"


def test_complaints_are_short_lines_of_printable_characters(caplog: pytest.LogCaptureFixture) -> None:
    Complaints(logging.getLogger("flowspec.test")).warn("\x1b[2J\nfake: all is well\r\ud800" + "x" * 10**6)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.isprintable() and len(text) < 400 and text.startswith("\\x1b[2J\\nfake") and "characters)" in text
