"""Texts that come out piece by piece are the texts that come out whole, up to the first stop string."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.model.loader import Checkpoint
from flowspec.text import Detokenizer, Vocabulary
from tiny_models import TOKENIZERS, make_text_tokenizer

NUM_SEQUENCES = int(os.environ.get("FLOWSPEC_FUZZ", "20000"))  # of all tokenizers together; `make fuzz` runs more


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Checkpoint.open("demo").load_tokenizer()


@pytest.fixture(scope="module")
def fallback() -> Any:
    return make_text_tokenizer("byte-fallback")


def ids_of(tokenizer: Any, *names: str) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert tokenizer.convert_ids_to_tokens(ids) == list(names)
    return ids


def run(tokenizer: Any, ids: list[int], cuts: list[int], stop: tuple[str, ...]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(Vocabulary(tokenizer), {0}, stop)
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
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    assert detokenizer.add(ids[:-1]) == ""
    assert "�" in detokenizer.finish()


def test_tokens_behind_a_stop_string_are_not_read(tokenizer: Any) -> None:
    ids = tokenizer("one two three", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(Vocabulary(tokenizer), (), ("two",))
    assert detokenizer.add(ids) == "one "
    assert detokenizer.num_tokens < len(ids) and detokenizer.add(ids) == "" and detokenizer.finish() == ""


# --- any tokenizer, any tokens ---


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_random_tokens_come_out_as_the_decoded_whole(kind: str) -> None:
    tokenizer, rng = make_text_tokenizer(kind), random.Random(kind)
    vocabulary = Vocabulary(tokenizer)
    # Rare in a vocabulary, and the ones that matter: half characters, spaces, tokens without text, ids without tokens.
    texts = [vocabulary.decode([token_id]) for token_id in range(len(tokenizer) + 2)]
    odd_ids = [token_id for token_id, text in enumerate(texts) if not text.strip() or "�" in text]
    for _ in range(NUM_SEQUENCES // len(TOKENIZERS)):
        length = rng.choice((1, 2, 3, 5, 8, 13, 80))
        ids = [rng.choice(odd_ids) if rng.random() < 0.5 else rng.randrange(len(tokenizer) + 2) for _ in range(length)]
        whole = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        detokenizer = Detokenizer(vocabulary)
        pieces = [detokenizer.add([token_id]) for token_id in ids]
        assert whole.startswith("".join(pieces)), "a character left before it was whole"
        assert "".join([*pieces, detokenizer.finish()]) == detokenizer.text == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_is_the_same_wherever_the_prompt_ends(kind: str) -> None:
    tokenizer = make_text_tokenizer(kind)
    vocabulary = Vocabulary(tokenizer)
    text = "def f(x):\n    return x  # wörld 😀 hello world\n\n" * 2
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = vocabulary.decode(ids)
    for cut in range(1, len(ids)):
        detokenizer = Detokenizer(vocabulary, prompt_ids=ids[:cut])
        output = detokenizer.add(ids[cut:]) + detokenizer.finish()
        prompt = vocabulary.decode(ids[:cut])
        assert prompt.rstrip("�") + output == whole, "a character that the output makes whole is the output's"


@pytest.mark.parametrize("kind", ["byte-fallback", "byte-level"])
@pytest.mark.parametrize("text", ["x = 'wörld' 😀\n", " hello  world", "hello"])
def test_bytes_of_tokens_add_up_to_the_text(kind: str, text: str) -> None:
    tokenizer = make_text_tokenizer(kind)
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer(f"a{text}", add_special_tokens=False).input_ids
    added = b"".join(vocabulary.token_bytes(token_id) for token_id in ids)
    assert added.decode().lstrip() == vocabulary.decode(ids)
    assert all(vocabulary.token_text(i) == vocabulary.token_bytes(i).decode("utf-8", "replace") for i in ids)


def test_tokens_without_text_have_their_name_or_no_bytes(fallback: Any) -> None:
    vocabulary = Vocabulary(fallback)
    assert vocabulary.token_text(fallback.eos_token_id) == "</s>"
    assert vocabulary.token_bytes(len(fallback) + 5) == b"", "an id that is padding"


def test_a_byte_and_a_half_character_before_a_word_do_not_raise(fallback: Any) -> None:
    ids = ids_of(fallback, "<0x0A>", "<0xE2>", "▁world")
    detokenizer = Detokenizer(Vocabulary(fallback))
    assert detokenizer.add(ids) + detokenizer.finish() == fallback.backend_tokenizer.decode(ids)


def test_the_first_token_keeps_its_space(fallback: Any) -> None:
    prompt_ids = fallback("hello", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(Vocabulary(fallback), prompt_ids=prompt_ids)
    assert detokenizer.add(ids_of(fallback, "▁world")) == " world"
    assert Vocabulary(fallback).token_text(ids_of(fallback, "▁world")[0]) == " world"


@pytest.mark.parametrize("names", [("a", "<0xE2>", "<0x82>"), ("<0xE2>",), ("a", "<0x0A>", "<0xE2>")])
def test_nothing_of_a_prompt_that_ends_in_half_a_character_leaks(fallback: Any, names: tuple[str, ...]) -> None:
    detokenizer = Detokenizer(Vocabulary(fallback), prompt_ids=ids_of(fallback, *names))
    assert detokenizer.add(ids_of(fallback, "▁world", "a")) + detokenizer.finish() == " worlda"


def test_a_half_character_of_the_prompt_becomes_whole(fallback: Any) -> None:
    detokenizer = Detokenizer(Vocabulary(fallback), prompt_ids=ids_of(fallback, "a", "<0x0A>", "<0xE2>", "<0x82>"))
    assert detokenizer.add(ids_of(fallback, "<0xAC>", "a")) == "€a"


def test_a_stop_string_of_fallback_bytes_ends_the_text_at_once(fallback: Any) -> None:
    detokenizer = Detokenizer(Vocabulary(fallback), (), ("\n",))
    assert detokenizer.add(ids_of(fallback, "a", "<0x0A>")) == "a"
    assert detokenizer.is_stopped and detokenizer.num_tokens == 2


def test_a_long_row_of_broken_bytes_is_told_as_it_comes(tokenizer: Any) -> None:
    half = tokenizer("😀", add_special_tokens=False).input_ids[0]
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    assert len(detokenizer.add([half] * 1000)) > 990
