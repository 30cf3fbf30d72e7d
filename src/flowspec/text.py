"""Chats to token ids; token ids to text, up to the first stop string. Knows tokenizers; knows no requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from tokenizers.decoders import DecodeStream

from flowspec.errors import UsageError


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of the messages in the model's chat template, up to where the answer begins.

    ``tokenizer``: of transformers, with a template. Raises ``UsageError`` when it refuses the messages.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UsageError(f"messages: the model's chat template refuses them: {error}") from None
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


class Detokenizer:
    """One output. A character whose bytes are incomplete waits for the rest, and so does what may begin a stop string.

    After ``is_stopped``, ``num_tokens`` of the output's tokens were read: the last one completed the stop string.
    """

    def __init__(self, tokenizer: Any, hidden_ids: Iterable[int] = (), stop: Sequence[str] = ()) -> None:
        """``tokenizer``: of transformers. ``hidden_ids``: tokens without text, as the one that ends it."""
        self._backend = tokenizer.backend_tokenizer
        self._hidden_ids = frozenset(hidden_ids)
        self._stop = tuple(stop)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""  # decoded, but it may belong to a stop string
        self._pending: list[int] = []  # tokens whose text waits for more bytes
        self.text = ""
        self.num_tokens = 0
        self.is_stopped = False

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now, and was not before."""
        num_before = len(self.text)
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            if token_id in self._hidden_ids:
                continue
            piece = self._stream.step(self._backend, token_id)
            self._pending = [] if piece else [*self._pending, token_id]
            self._extend(piece or "")
        return self.text[num_before:]

    def finish(self) -> str:
        """No token comes any more; what was held back is text after all, and broken characters show as such."""
        rest = self._backend.decode(self._pending) if self._pending and not self.is_stopped else ""
        self._pending = []
        num_before = len(self.text)
        if not self.is_stopped:
            self._extend(rest)
            self.text, self._held = self.text + self._held, ""
        return self.text[num_before:]

    def _extend(self, piece: str) -> None:
        held = self._held + piece
        ends = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self.text, self._held, self.is_stopped = self.text + held[: min(ends)], "", True
            return
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self.text, self._held = self.text + held[: len(held) - keep], held[len(held) - keep :]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
