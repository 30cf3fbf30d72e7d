"""The answer to one HTTP request: its choices, collected or streamed. Knows the service and the replies; no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from flowspec.core import SamplingParams, TokenLogprobs
from flowspec.errors import FlowspecError, UsageError
from flowspec.llm import TextChunk
from flowspec.server import replies
from flowspec.server.replies import Completions, Json, TextOffset
from flowspec.server.schemas import GenerateBody
from flowspec.server.service import Service, Ticket


class Answer:
    """The choices of one HTTP request."""

    def __init__(
        self,
        service: Service,
        name: str,
        body: GenerateBody,
        shape: Completions,
        echoes: Sequence[str],
        spec_stats: bool,
    ) -> None:
        self._service = service
        self._name = name
        self._body = body
        self._shape = shape
        self._echoes = echoes  # what goes before the text, by choice
        self._tells_stats = spec_stats if body.return_spec_stats is None else body.return_spec_stats
        self._offsets = [TextOffset(len(echo)) for echo in echoes]
        self._tickets: list[Ticket] = []
        self._num_streamed = 0  # tokens of all choices

    def submit(self, jobs: Sequence[tuple[tuple[int, ...], SamplingParams]]) -> None:
        """All of them, or none. Raises as ``Service.submit``."""
        try:
            for offset, (prompt_ids, params) in enumerate(jobs):
                name = self._name if len(jobs) == 1 else f"{self._name}-{offset}"
                self._tickets.append(self._service.submit(name, prompt_ids, params, self._shape.is_chat))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        for ticket in self._tickets:
            self._service.cancel(ticket)

    async def collect(self) -> Json:
        """The whole answer."""
        choices: list[Json] = []
        for index, ticket in enumerate(self._tickets):
            text, logprobs = self._echoes[index], list[TokenLogprobs]()
            async for chunk in ticket.chunks():
                text += chunk.text
                logprobs += chunk.logprobs
            told = None if ticket.job.request.params.num_logprobs is None else logprobs
            choice = self._shape.choice(index, text, told, ticket.job.finish_reason, self._offsets[index])
            choices.append(choice | self._stats(ticket))
        return self._shape.body(self._name, choices, is_chunk=False) | {"usage": replies.usage(self._tickets)}

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events, as text becomes certain; a client that goes away cancels its requests."""
        try:
            for index, echo in enumerate(self._echoes):
                if (first := self._shape.first_delta(index)) is not None:
                    yield self._event([first])
                if echo:
                    yield self._event([self._shape.delta(index, echo, None, self._offsets[index])])
            async for index, chunk in _merged(self._tickets):
                ticket = self._tickets[index]
                if isinstance(chunk, TextChunk):
                    self._num_streamed += len(chunk.token_ids)
                    has_logprobs = ticket.job.request.params.num_logprobs is not None
                    if chunk.text or (has_logprobs and chunk.logprobs):
                        logprobs = chunk.logprobs if has_logprobs else None
                        yield self._event([self._shape.delta(index, chunk.text, logprobs, self._offsets[index])])
                else:
                    yield self._event([self._shape.last_delta(index, ticket.job.finish_reason) | self._stats(ticket)])
            if self._body.wants_usage:
                yield replies.event(
                    self._shape.body(self._name, [], is_chunk=True) | {"usage": replies.usage(self._tickets)}
                )
        except FlowspecError as error:
            if isinstance(error, UsageError):
                told = replies.error(str(error), "invalid_request_error", error.field, error.code)
            else:
                told = replies.error(str(error), "server_error")
            yield replies.event(told)
        finally:
            self.cancel()
        yield replies.DONE

    def _event(self, choices: list[Json]) -> bytes:
        body = self._shape.body(self._name, choices, is_chunk=True)
        if self._body.wants_usage_always:
            body["usage"] = replies.usage(self._tickets, self._num_streamed)
        return replies.event(body)

    def _stats(self, ticket: Ticket) -> Json:
        return {"spec_stats": replies.spec_stats(ticket.job)} if self._tells_stats else {}


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, TextChunk | None]]:
    """(choice, chunk) as they come; ``None`` after a choice's last one."""
    if len(tickets) == 1:
        async for chunk in tickets[0].chunks():
            yield 0, chunk
        yield 0, None
        return
    merged: asyncio.Queue[tuple[int, TextChunk | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, ticket: Ticket) -> None:
        try:
            async for chunk in ticket.chunks():
                merged.put_nowait((index, chunk))
            merged.put_nowait((index, None))
        except FlowspecError as error:
            merged.put_nowait((index, error))

    pumps = [asyncio.ensure_future(pump(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        num_left = len(tickets)
        while num_left:
            index, chunk = await merged.get()
            if isinstance(chunk, BaseException):
                raise chunk
            num_left -= chunk is None
            yield index, chunk
    finally:
        for task in pumps:
            task.cancel()
