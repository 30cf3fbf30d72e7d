"""Token ids to text, piece by piece, up to the first stop string. Knows tokenizers; knows no requests."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any


class Vocabulary:
    """What single tokens stand for: bytes, which need not be whole characters, or nothing that a text shows.

    Three kinds of tokenizer spell bytes differently: byte-level ones (GPT-2's) have a letter for each byte, those with
    byte fallback (SentencePiece's) a token ``<0xE2>`` for a byte that no other token covers, others none.
    """

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: of transformers, with a backend of the tokenizers library."""
        self._backend = tokenizer.backend_tokenizer
        decoder = self._backend.decoder
        names = "" if decoder is None else decoder.__getstate__().decode()
        self._is_byte_level = '"ByteLevel"' in names
        self._has_fallback = '"ByteFallback"' in names
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.token_bytes = lru_cache(_MAX_KNOWN)(self._token_bytes)

    def decode(self, token_ids: Sequence[int]) -> str:
        """As the whole text would be shown, special tokens left out; broken characters as U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def is_shown(self, token_id: int) -> bool:
        """Whether a text shows anything of the token: it is no special one, and not outside the vocabulary."""
        return token_id not in self._special_ids and self._backend.id_to_token(token_id) is not None

    def fallback_byte(self, token_id: int) -> int | None:
        """The byte that the token spells, if it is of byte fallback: what it becomes depends on its neighbours."""
        name = self._backend.id_to_token(token_id) if self._has_fallback else None
        return int(name[3:5], 16) if name is not None and _FALLBACK_BYTE.fullmatch(name) else None

    def first_bytes(self, token_id: int) -> bytes:
        """At the beginning of a text, where many tokenizers leave a token's space out."""
        if self._is_byte_level or not self.is_shown(token_id) or self.fallback_byte(token_id) is not None:
            return self.token_bytes(token_id)
        return self.decode([token_id]).encode()

    def _token_bytes(self, token_id: int) -> bytes:
        """In the middle of a text; of a special token, its name. They add up to the text's own bytes."""
        if (byte := self.fallback_byte(token_id)) is not None:
            return bytes([byte])
        name = self._backend.id_to_token(token_id)
        if name is None:
            return b""
        if token_id in self._special_ids:
            return name.encode()
        if self._is_byte_level:
            letters = _byte_letters()
            return bytes(letters[c] for c in name) if letters.keys() >= set(name) else name.encode()
        # Behind itself, a token is not the first one, which some decoders take a space from.
        return self.decode([token_id, token_id])[len(self.decode([token_id])) :].encode()

    def token_text(self, token_id: int) -> str:
        """As ``token_bytes``; bytes that are no character alone show as such."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


class TextStream:
    """The text of tokens as they come: what is certain of it, and what more there is if no other token comes.

    The parts add up to the decoded whole. A text is decoded again from a few tokens before what is new, since a token
    reads differently at the beginning; the prompt's last ones serve at first. What may still change waits: an
    incomplete character, and a run of byte-fallback tokens, which is one text if it is valid UTF-8 and a row of U+FFFD
    if it is not, so that even a byte that is a letter is uncertain until the run ends.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._window = _context(vocabulary, prompt_ids)
        self._told = vocabulary.decode(self._window)  # of the window's text, what is out or is the prompt's
        self._is_open = False  # the window ends in a run of byte-fallback tokens, of which nothing is told
        self._rest = ""

    def step(self, token_id: int) -> str:
        """The text that is certain now, and was not before."""
        if not self._vocabulary.is_shown(token_id):
            return ""
        self._window.append(token_id)
        self._is_open = self._vocabulary.fallback_byte(token_id) is not None
        if self._is_open:
            return ""
        text, start = self._decode()
        end = max(start, len(text) - text.endswith(_BROKEN))
        self._told, self._rest = text[:end], text[end:]
        if len(self._window) > _MAX_WINDOW:
            self._trim()
        return text[start:end]

    @property
    def rest(self) -> str:
        """What else the text has, as it is now; more tokens may change it."""
        if not self._is_open:
            return self._rest
        text, start = self._decode()
        return text[start:]

    def _decode(self) -> tuple[str, int]:
        """The window's text, and where the part begins that is not told.

        Where the text is not what was told and more, a character has become whole that was incomplete in the prompt.
        """
        text, told = self._vocabulary.decode(self._window), self._told
        same = (a == b for a, b in zip(text, told, strict=False))
        return text, len(told) if text.startswith(told) else (*same, False).index(False)

    def _trim(self) -> None:
        """Keep enough to read the next token by, and all of a character that is not complete."""
        self._window = _shortest_context(self._vocabulary, self._window)
        text = self._vocabulary.decode(self._window)
        self._told = text[: len(text) - len(self._rest)]


class Detokenizer:
    """One output. A character whose bytes are incomplete waits for the rest, and so does what may begin a stop string.

    After ``is_stopped``, ``num_tokens`` of the output's tokens were read: the last one completed the stop string.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        hidden_ids: Iterable[int] = (),
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """``hidden_ids``: tokens without text, as the one that ends it. ``prompt_ids``: what the output continues."""
        self._hidden_ids = frozenset(hidden_ids)
        self._stop = tuple(stop)
        self._stream = TextStream(vocabulary, prompt_ids)
        self._held = ""  # decoded, but it may belong to a stop string
        self.text: str = ""
        self.num_tokens = 0
        self.is_stopped = False

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now, and was not before."""
        num_before = len(self.text)
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            if token_id not in self._hidden_ids:
                self._extend(self._stream.step(token_id))
        return self.text[num_before:]

    def finish(self) -> str:
        """No token comes any more; what was held back is text after all, and broken characters show as such."""
        num_before = len(self.text)
        if not self.is_stopped:
            self.text, self._held = self.text + self._held + self._stream.rest, ""
        return self.text[num_before:]

    def _extend(self, piece: str) -> None:
        self._held += piece
        # A stop string ends the text as soon as the text has it, even if more tokens might change that.
        shown = self._held + self._stream.rest.partition(_BROKEN)[0] if self._stop else self._held
        ends = [place for place in (shown.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self.text, self._held, self.is_stopped = self.text + shown[: min(ends)], "", True
            return
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        free = len(self._held) - keep
        self.text, self._held = self.text + self._held[:free], self._held[free:]


_BROKEN = "\ufffd"  # what stands for bytes that are no character
_FALLBACK_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NUM_CONTEXT = 8  # tokens to read the next one by; an incomplete character is at most three
_MAX_WINDOW = 32
_MAX_KNOWN = 2**16  # tokens whose bytes are remembered


@lru_cache(1)
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones stand for themselves (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _context(vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> list[int]:
    """The tokens of a prompt that its continuation is read by.

    Of a run of fallback bytes at the end, only those of an incomplete character: bytes that follow belong to it, while
    a complete one is no part of what comes.
    """
    shown = _shown_backwards(vocabulary, prompt_ids)
    run: list[tuple[int, int]] = []  # token id and byte, the last one first
    before: list[int] = []
    for token_id in shown:
        if (byte := vocabulary.fallback_byte(token_id)) is None:
            before = [token_id]
            break
        run.append((token_id, byte))
    for token_id in shown:
        if len(before) >= _NUM_CONTEXT and vocabulary.decode(before[::-1]):
            break
        before.append(token_id)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(byte for _, byte in run[2::-1]))
    num_incomplete = len(decoder.getstate()[0])
    if not vocabulary.decode(before[::-1]):
        num_incomplete = len(run)  # there is nothing else to read by
    return [*before[::-1], *(token_id for token_id, _ in run[:num_incomplete][::-1])]


def _shown_backwards(vocabulary: Vocabulary, token_ids: Sequence[int]) -> Iterator[int]:
    return (token_id for token_id in reversed(token_ids) if vocabulary.is_shown(token_id))


def _shortest_context(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """The last tokens, enough to have a text: in front of it, the next one is not the first."""
    num_kept = _NUM_CONTEXT
    while num_kept < len(token_ids) and not vocabulary.decode(token_ids[-num_kept:]):
        num_kept *= 2
    return list(token_ids[-num_kept:])


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
