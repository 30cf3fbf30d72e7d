"""Conversations to prompts: the model's own Jinja template, run in the sandbox of transformers. Knows no requests."""

from __future__ import annotations

import ctypes
import inspect
import json
import resource
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from flowspec.errors import NO_CHAT_TEMPLATE, UsageError

Message = Mapping[str, Any]  # role, content, and whatever else the template knows

TIMEOUT_S = 5.0  # of a template; one that loops for ever is a model's fault, and must not stop a server
MAX_CHARS = 8 * 2**20  # of what it makes
HEADROOM_BYTES = 2 * 2**30  # that the process may grow by meanwhile: 'x' * 10**10 is an error, and not the end of it
KNOWN_ROLES = ("system", "user", "assistant", "tool")
_MARKER = "flowspecanswer"

T = TypeVar("T")


class ChatTemplate:
    """The template of one tokenizer. Any failure in it is a ``UsageError`` that names ``messages``."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        """``tokenizer``: of transformers. ``model``: its name, for messages."""
        self._tokenizer = tokenizer
        self._model = model
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}

    @property
    def is_there(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @cached_property
    def problem(self) -> str | None:
        """Why the template can be of no use at all."""
        if not self.is_there:
            return None
        try:
            self.encode([{"role": "user", "content": "Hi"}])
        except UsageError as error:
            return str(error).removeprefix("messages: ")
        return None

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The special token that the template puts behind an answer, which the model was trained to end it with."""
        if not self.is_there:
            return frozenset()
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARKER}]
        with suppress(UsageError):
            behind = self._render(messages, {}, False).rpartition(_MARKER)[2].lstrip()
            ids = self._tokenizer(behind, add_special_tokens=False, verbose=False).input_ids
            added = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
            return frozenset(token_id for token_id in ids[:1] if token_id in added and added[token_id].special)
        return frozenset()

    def between_turns(self) -> tuple[str, str, str]:
        """What stands before a first question, between it and the answer, and between the answer and the next question.

        Raises ``UsageError`` for a template that is of no use.
        """
        question, answer, next_question = (f"{_MARKER}{number}" for number in range(3))
        roles = ("user", "assistant", "user")
        contents = (question, answer, next_question)
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        begin, _, rest = self._render(messages, {}, True).partition(question)
        to_answer, _, rest = rest.partition(answer)
        to_question, found, _ = rest.partition(next_question)
        if not found:
            raise UsageError(f"{self._model}: its chat template leaves out what is said; train on given text instead")
        return begin, to_answer, to_question

    def encode(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        ``options``: what else the template may know, as ``enable_thinking``.
        """
        if not self.is_there:
            raise UsageError(
                f"{self._model} has no chat template, so it cannot chat; let it continue a text, or use a model whose "
                "tokenizer has one",
                code=NO_CHAT_TEMPLATE,
            )
        if not messages or not all("role" in message for message in messages):
            raise UsageError(
                'messages: give at least one, each with role and content, as {"role": "user", "content": "Hi"}',
                field="messages",
            )
        options = dict(options or {})
        if taken := sorted(self._reserved & options.keys()):
            raise UsageError(
                f"chat_template_kwargs: {taken[0]} is not the template's, and cannot be set",
                field="chat_template_kwargs",
            )
        text = self._render([_as_templates_take_it(message) for message in messages], options, True)
        for number, message in enumerate(messages):
            content = message.get("content")
            is_told = not isinstance(content, str) or content.strip() in text
            if message["role"] not in KNOWN_ROLES and not is_told:
                raise UsageError(
                    f"messages: the model's chat template knows no role {message['role']!r} ({number})",
                    field="messages",
                )
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any], begins_answer: bool) -> str:
        apply = self._tokenizer.apply_chat_template
        try:
            with _BOUND:
                text = _within(
                    TIMEOUT_S,
                    lambda: apply(list(messages), tokenize=False, add_generation_prompt=begins_answer, **options),
                )
            if len(text) > MAX_CHARS:
                raise MemoryError(f"they become a text of {len(text)} characters; the most is {MAX_CHARS}")
            return text
        except Exception as error:  # a template is a program: it may raise whatever it likes
            told = str(error).strip() or type(error).__name__
            raise UsageError(f"messages: the model's chat template refuses them: {told}", field="messages") from None


def _as_templates_take_it(message: Message) -> dict[str, Any]:
    """OpenAI's clients send the arguments of a tool call as a text of JSON, templates want the object."""
    taken = dict(message)
    calls: Any = taken.get("tool_calls")
    if isinstance(calls, list):
        taken["tool_calls"] = list(map(_with_object, cast("list[Any]", calls)))
    return taken


def _with_object(call: Any) -> Any:
    try:
        function: Mapping[str, Any] = call["function"]
        arguments = json.loads(function["arguments"] or "{}")
    except (KeyError, TypeError, ValueError):
        return call  # what a model wrote need not be JSON; a template may still print it
    return {**call, "function": {**function, "arguments": arguments}}


class _MemoryBound:
    """Of this process, while any thread is inside; where the system has no such bound there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before: tuple[int, int] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._before = _bound_memory(HEADROOM_BYTES)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside and self._before is not None:
                resource.setrlimit(resource.RLIMIT_AS, self._before)


def _bound_memory(more_bytes: int) -> tuple[int, int] | None:
    """Let this process take so much more; returns the limits before."""
    with suppress(OSError, ValueError):
        num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        wanted = num_pages * resource.getpagesize() + more_bytes
        if before[0] == resource.RLIM_INFINITY or wanted < before[0]:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, before[1]))
            return before
    return None


_BOUND = _MemoryBound()


class _TemplateTimeoutError(Exception):
    def __str__(self) -> str:
        return f"it ran for more than {TIMEOUT_S:.0f} s"


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of ``call``; raises in it, between two steps of Python code, when it takes longer."""
    lock, is_over, has_fired = threading.Lock(), False, False
    thread_id = threading.get_ident()

    def interrupt() -> None:
        nonlocal has_fired
        with lock:
            if not is_over:
                has_fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread_id), ctypes.py_object(_TemplateTimeoutError)
                )

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        return call()
    finally:
        timer.cancel()
        with lock:
            is_over = True
        if has_fired:  # it may be on its way still, and must not arrive in somebody else's work
            with suppress(_TemplateTimeoutError):
                for _ in range(10_000):
                    pass
