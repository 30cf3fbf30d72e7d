"""A server to talk to, flowspec's or another that is compatible with OpenAI's. Knows no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import httpx
import msgspec

from flowspec.errors import NO_CHAT_TEMPLATE, FlowspecError, UsageError
from flowspec.talk.talker import CONTINUED_TOKENS, Message, Piece, Settings, Tell, accepted_per_draft, only_continues

_CONNECT_TIMEOUT_S = 10.0
_NUM_RETRIES = 2  # when the server is busy
_LONGEST_RETRY_S = 30.0


class ServerError(FlowspecError):
    """The server is not there, was lost, or failed."""


class _Stats(msgspec.Struct):
    num_drafts: int = 0
    num_accepted_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    """Of a completion, or of a chat."""

    text: str = ""
    delta: _Delta = msgspec.field(default_factory=_Delta)
    spec_stats: _Stats | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class RemoteTalker:
    """An OpenAI-compatible server; ``close`` it. Raises ``FlowspecError`` if it is not there or wants another key."""

    def __init__(self, url: str, api_key: str | None, model: str | None, timeout_s: float, tell: Tell) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._tell = tell
        self._can_chat = True  # until the server says otherwise
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        with self._errors():
            self._client = httpx.Client(
                base_url=self._url,
                headers=headers,
                timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
                # One that is kept while the user types may be closed by the server just as it is used again.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
            try:
                self.name = model or self._first_model()
            except BaseException:
                self.close()
                raise

    def _first_model(self) -> str:
        response = self._client.get("/v1/models")
        if not response.is_success:
            raise _refusal(response)
        models = msgspec.json.decode(response.content, type=_Models).data
        if not models:
            raise ServerError(f"{self._url} serves no model")
        return models[0].id

    @property
    def is_gone(self) -> bool:
        return False  # it may be started again

    def close(self) -> None:
        self._client.close()

    def reply(self, messages: Sequence[Message], settings: Settings) -> Generator[Piece, None, None]:
        with self._errors(), contextlib.closing(self._begin(messages, settings)) as response:
            yield from _read_answer(response)

    def _begin(self, messages: Sequence[Message], settings: Settings) -> httpx.Response:
        """An answer, of which nothing is read yet."""
        if self._can_chat:
            try:
                return self._ask("chat/completions", {"messages": messages}, settings)
            except UsageError as error:
                if error.code != NO_CHAT_TEMPLATE:
                    raise
            self._can_chat = False
            self._tell(only_continues(self.name))
        return self._ask("completions", {"prompt": messages[-1]["content"], "max_tokens": CONTINUED_TOKENS}, settings)

    def _ask(self, route: str, body: dict[str, Any], settings: Settings) -> httpx.Response:
        """A server that is busy is asked again when it says."""
        wanted = dict(settings.given)
        if "logit_bias" in wanted:
            wanted["logit_bias"] = {str(token_id): bias for token_id, bias in wanted["logit_bias"]}
        body |= wanted
        body |= {"model": self.name, "stream": True, "return_spec_stats": True}
        body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        request = self._client.build_request("POST", f"/v1/{route}", json=body)
        response = self._client.send(request, stream=True)
        for _ in range(_NUM_RETRIES):
            if response.status_code != 429:
                break
            response.close()
            wait_s = _retry_after_s(response)
            self._tell(f"the server is busy; trying again in {wait_s:g} s")
            time.sleep(wait_s)
            response = self._client.send(request, stream=True)
        if not response.is_success:
            with contextlib.closing(response):
                raise _refusal(response)
        return response

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Those of the connection as ours."""
        try:
            yield
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
            raise UsageError(f"{self._url!r} is no address of a server ({error}); as http://127.0.0.1:8000") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = f"{error}" or "no answer"
            raise ServerError(f"cannot reach {self._url} ({reason}); is 'flowspec serve' running there?") from None
        except httpx.TimeoutException:
            raise ServerError(
                f"{self._url} has said nothing for {self._timeout_s:g} s; see its log, or give it longer with --timeout"
            ) from None
        except httpx.HTTPError as error:
            raise ServerError(f"lost {self._url}: {error}; is the server still running?") from None
        except msgspec.DecodeError as error:
            raise ServerError(f"{self._url} sent what is no answer of an OpenAI server: {error}") from None


def _read_answer(response: httpx.Response) -> Iterator[Piece]:
    num_tokens, stats = 0, None
    for data in read_events(response.iter_bytes()):
        if data == b"[DONE]":
            accepted = accepted_per_draft(stats.num_accepted_tokens, stats.num_drafts) if stats is not None else None
            yield Piece("", num_tokens, accepted)
            return
        event = msgspec.json.decode(data, type=_Event)
        if event.error is not None:
            raise ServerError(event.error.message)
        if event.usage is not None:
            num_tokens = event.usage.completion_tokens
        for choice in event.choices:
            stats = choice.spec_stats or stats
            if text := choice.text or choice.delta.content:
                yield Piece(text, num_tokens)
    raise ServerError("the server ended its answer in the middle; is it still running?")


def read_events(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events, each in one line. Only newlines end it: U+2028 and the like belong to texts."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _refusal(response: httpx.Response) -> FlowspecError:
    """``UsageError`` for what the user can mend, ``ServerError`` for the rest."""
    message, code = response.reason_phrase, None
    with contextlib.suppress(msgspec.DecodeError):
        if (error := msgspec.json.decode(response.read(), type=_Event).error) is not None:
            message, code = error.message, error.code
    told = " ".join(f"the server answered {response.status_code}: {message}".split())
    if response.status_code == 401:
        return UsageError(f"{told}; here with --api-key, or in FLOWSPEC_API_KEY")
    return UsageError(told, code=str(code)) if 400 <= response.status_code < 429 else ServerError(told)


def _retry_after_s(response: httpx.Response) -> float:
    given = response.headers.get("retry-after", "")
    return min(float(given), _LONGEST_RETRY_S) if given.isdecimal() else 1.0
