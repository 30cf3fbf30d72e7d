"""What clients get: the JSON of completions, chats and errors. Values in, dictionaries out."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from flowspec.core import TokenLogprobs
from flowspec.engine.job import Job
from flowspec.server.service import Ticket
from flowspec.text import Vocabulary

Json = dict[str, Any]

encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


def event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(tickets: Sequence[Ticket], num_completion: int | None = None) -> Json:
    """Of all choices, or so far; a prompt counts once, however many choices it has."""
    prompts = {ticket.job.request.prompt_ids: ticket.job for ticket in tickets}.values()
    num_prompt = sum(len(job.request.prompt_ids) for job in prompts)
    if num_completion is None:
        num_completion = sum(ticket.run.num_tokens for ticket in tickets)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(job.num_cached for job in prompts)},
    }


def spec_stats(job: Job) -> Json:
    """How a text came about; docs/METHODOLOGY.md defines the figures."""
    stats, emissions = job.stats, job.emissions
    assert stats is not None, "it has run"
    num_drafts = stats.verdicts if stats.drafted else 0
    return {
        "num_drafts": num_drafts,
        "num_draft_tokens": stats.drafted,
        "num_accepted_tokens": stats.accepted,
        "mean_acceptance_length": round(1 + stats.accepted / num_drafts, 4) if num_drafts else None,
        "num_accepted_tokens_per_pos": stats.accepted_by_position,
        "num_pruned_in_flight": stats.pruned,
        "num_restarts": stats.restarts,
        "time_to_first_token_ms": round(emissions.ttft_s * 1000, 3),
        "mean_inter_token_latency_ms": None
        if emissions.came_at_once
        else round(1000 * emissions.decode_s / emissions.num_decoded, 3),
    }


class TextOffset:
    """How far one choice's text has come, for the offsets of its tokens."""

    def __init__(self, offset: int) -> None:
        """``offset``: characters before the first token, which are the prompt's."""
        self._offset = offset
        self.is_first = True  # no token has come yet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next_offset(self, token_bytes: bytes) -> int:
        """Of a token; one that begins inside a character has that character's."""
        offset, self.is_first = self._offset, False
        self._offset += len(self._decoder.decode(token_bytes))
        return offset


class Completions:
    """The shape of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    is_chat = False

    def __init__(self, model: str, vocabulary: Vocabulary) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._created = int(time.time())

    def body(self, name: str, choices: list[Json], is_chunk: bool) -> Json:
        kind = self.chunk_kind if is_chunk else self.kind
        return {"id": name, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def first_delta(self, index: int) -> Json | None:
        """Sent before any text."""
        return None

    def delta(self, index: int, text: str, logprobs: list[TokenLogprobs] | None, offset: TextOffset) -> Json:
        return self.choice(index, text, logprobs, None, offset)

    def last_delta(self, index: int, finish_reason: str | None) -> Json:
        return self.choice(index, "", None, finish_reason, TextOffset(0))

    def choice(
        self, index: int, text: str, logprobs: list[TokenLogprobs] | None, finish_reason: str | None, offset: TextOffset
    ) -> Json:
        told = None if logprobs is None else self.logprobs(logprobs, offset)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish_reason}

    def logprobs(self, logprobs: list[TokenLogprobs], offset: TextOffset) -> Json:
        return {
            "tokens": [self._name(token.token_id) for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [self._by_name(token) for token in logprobs],
            "text_offset": [offset.next_offset(self._vocabulary.token_bytes(token.token_id)) for token in logprobs],
        }

    def _by_name(self, token: TokenLogprobs) -> dict[str, float]:
        """The best tokens, best first. Two that look alike keep names of their own."""
        named: dict[str, float] = {}
        for token_id, logprob in token.top:
            name = self._name(token_id)
            named[f"token_id:{token_id}" if name in named else name] = logprob
        return named

    def _name(self, token_id: int) -> str:
        """Its text, or as OpenAI writes bytes that are no text alone."""
        token_bytes = self._vocabulary.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


class Chats(Completions):
    """The shape of ``/v1/chat/completions``."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"
    is_chat = True

    def first_delta(self, index: int) -> Json | None:
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, index: int, text: str, logprobs: list[TokenLogprobs] | None, offset: TextOffset) -> Json:
        told = None if logprobs is None else self.logprobs(logprobs, offset)
        return self._delta(index, {"content": text}, told, None)

    def last_delta(self, index: int, finish_reason: str | None) -> Json:
        return self._delta(index, {}, None, finish_reason)

    def _delta(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def choice(
        self, index: int, text: str, logprobs: list[TokenLogprobs] | None, finish_reason: str | None, offset: TextOffset
    ) -> Json:
        told = None if logprobs is None else self.logprobs(logprobs, offset)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": told, "finish_reason": finish_reason}

    def logprobs(self, logprobs: list[TokenLogprobs], offset: TextOffset) -> Json:
        return {"content": [self._told(token, offset) for token in logprobs]}

    def _told(self, token: TokenLogprobs, offset: TextOffset) -> Json:
        """``bytes`` are the tokens' own, so that those of half a character can be joined."""
        bytes_of = self._vocabulary.first_bytes if offset.is_first else self._vocabulary.token_bytes
        offset.next_offset(bytes_of(token.token_id))

        def named(token_id: int, logprob: float) -> Json:
            own = bytes_of(token_id)
            return {"token": own.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(own)}

        return {**named(token.token_id, token.logprob), "top_logprobs": [named(*pair) for pair in token.top]}
