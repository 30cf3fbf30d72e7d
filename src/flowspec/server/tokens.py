"""Texts and chats to token ids and back, for an event loop: nothing long is done in it, and nothing waits for that."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from flowspec.engine.engine import Engine
from flowspec.errors import UsageError

INLINE_CHARS = 8192  # a shorter text is encoded faster than a thread is woken

T = TypeVar("T")


class Tokens:
    def __init__(self, engine: Engine) -> None:
        self._tokenizer: Any = engine.model.tokenizer
        self._vocab_size = engine.model.checkpoint.vocab_size
        self._chat_template = engine.model.chat_template
        self._tokenizer(
            "x", verbose=False
        )  # which undoes settings of its file: from here on, calls change nothing in it
        self._few = ThreadPoolExecutor(2, "flowspec-long-text")  # long texts wait for each other
        self._chats = ThreadPoolExecutor(4, "flowspec-chat")

    async def encode(self, prompt: str | Sequence[int], add_special_tokens: bool = True) -> tuple[int, ...]:
        """Raises ``UsageError`` for an empty prompt."""
        if not prompt:
            raise UsageError("the prompt is empty; give at least one token to continue")
        if not isinstance(prompt, str):
            return tuple(prompt)
        call = lambda: self._tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False).input_ids  # noqa: E731
        return tuple(await self._run(call, len(prompt)))

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> tuple[int, ...]:
        """As ``ChatTemplate.encode``: raises ``UsageError``."""
        is_long = sum(len(str(message["content"])) for message in messages) > INLINE_CHARS
        executor = self._few if is_long else self._chats  # a template is a program, and may take its time
        call = functools.partial(self._chat_template.encode, messages, options)
        return tuple(await asyncio.get_running_loop().run_in_executor(executor, call))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Special tokens included. Raises ``UsageError`` for an id outside of the vocabulary."""
        if any(token_id >= self._vocab_size for token_id in token_ids):
            raise UsageError(f"tokens: an id is outside of the vocabulary of {self._vocab_size}", field="tokens")
        return await self._run(lambda: self._tokenizer.decode(list(token_ids)), len(token_ids))

    async def _run(self, call: Callable[[], T], size: int) -> T:
        return call() if size <= INLINE_CHARS else await asyncio.get_running_loop().run_in_executor(self._few, call)
