"""Texts and chats to token ids and back, for an event loop. One tokenizer, one thread at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flowspec.engine import Engine
from flowspec.errors import UsageError
from flowspec.text import encode_chat

INLINE_CHARS = 8192  # a shorter text is encoded faster than a thread is woken

T = TypeVar("T")


class Tokens:
    def __init__(self, engine: Engine) -> None:
        self._tokenizer: Any = engine.tokenizer
        self._vocab_size = engine.checkpoint.vocab_size
        self._model = engine.checkpoint.name
        self._lock = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    async def encode(self, prompt: str | Sequence[int], add_special_tokens: bool = True) -> tuple[int, ...]:
        """Raises ``UsageError`` for an empty prompt."""
        if not prompt:
            raise UsageError("the prompt is empty; give at least one token to continue")
        if not isinstance(prompt, str):
            return tuple(prompt)
        call = lambda: self._tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False).input_ids  # noqa: E731
        return tuple(await self._run(call, len(prompt)))

    async def encode_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Raises ``UsageError`` when the model has no chat template, or its template refuses the messages."""
        if not self.has_chat_template:
            raise UsageError(
                f"{self._model} has no chat template, so it cannot chat; use /v1/completions, or a model whose "
                "tokenizer has one"
            )

        size = sum(len(str(message["content"])) for message in messages)
        ids = await self._run(lambda: encode_chat(self._tokenizer, messages), size)
        return tuple(ids)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Special tokens included. Raises ``UsageError`` for an id outside of the vocabulary."""
        if any(token_id >= self._vocab_size for token_id in token_ids):
            raise UsageError(f"tokens: an id is outside of the vocabulary of {self._vocab_size}")
        return await self._run(lambda: self._tokenizer.decode(list(token_ids)), len(token_ids))

    def text(self, token_id: int) -> str:
        """Of one token; bytes that are no character alone show as such."""
        with self._lock:
            return self._tokenizer.decode([token_id])

    async def _run(self, call: Callable[[], T], size: int) -> T:
        def locked() -> T:
            with self._lock:
                return call()

        return locked() if size <= INLINE_CHARS else await asyncio.to_thread(locked)
