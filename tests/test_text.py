"""Texts that come out piece by piece are the texts that come out whole, up to the first stop string."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.model.loader import Checkpoint
from flowspec.text import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Checkpoint.open("demo").load_tokenizer()


def run(tokenizer: Any, ids: list[int], cuts: list[int], stop: tuple[str, ...]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, {0}, stop)
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pieces = [detokenizer.add(ids[a:b]) for a, b in pairwise(places)]
    return [*pieces, detokenizer.finish()], detokenizer


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 100), max_size=6),
)
def test_pieces_are_the_whole_text_and_no_character_comes_broken(tokenizer: Any, text: str, cuts: list[int]) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces, detokenizer = run(tokenizer, ids, cuts, ())
    assert "".join(pieces) == detokenizer.text == whole
    assert all("�" not in piece for piece in pieces) or "�" in whole
    assert detokenizer.num_tokens == len(ids) and not detokenizer.is_stopped


@given(
    text=st.text("ab \n", min_size=1, max_size=60),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 100), max_size=8),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    tokenizer: Any, text: str, stop: list[str], cuts: list[int]
) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids)
    pieces, detokenizer = run(tokenizer, ids, cuts, tuple(stop))
    # The stop string that is complete first ends the text; of those that are complete together, the leftmost.
    prefixes = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    first = next((n for n, prefix in enumerate(prefixes) if any(s in prefix for s in stop)), None)
    if first is None:
        assert "".join(pieces) == whole and not detokenizer.is_stopped
    else:
        assert "".join(pieces) == prefixes[first][: min(prefixes[first].find(s) for s in stop if s in prefixes[first])]
        assert detokenizer.is_stopped and detokenizer.num_tokens == first


def test_bytes_that_never_become_a_character_show_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("😀", add_special_tokens=False).input_ids
    assert len(ids) > 1, "the demo tokenizer has learnt this one; choose another"
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.add(ids[:-1]) == ""
    assert "�" in detokenizer.finish()


def test_tokens_behind_a_stop_string_are_not_read(tokenizer: Any) -> None:
    ids = tokenizer("one two three", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(tokenizer, (), ("two",))
    assert detokenizer.add(ids) == "one "
    assert detokenizer.num_tokens < len(ids) and detokenizer.add(ids) == "" and detokenizer.finish() == ""
