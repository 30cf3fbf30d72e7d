"""The bodies of the OpenAI-compatible routes: what clients may send, and what it means for the engine.

A ``null`` is as good as an absent field, as at OpenAI. Unknown fields are kept: those that would change the answer are
refused by name, the others are logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from flowspec.core import MAX_LOGPROBS, MAX_SEED, MAX_STOPS, SamplingParams
from flowspec.errors import UsageError

MAX_TOKENS = 2**31 - 1
MAX_CHOICES = 16  # of one request
MAX_PROMPTS = 64  # of one request

NO_LIMIT = -1  # as ``max_tokens``

# Fields that would change the answer and are not supported, and the values with which they would not.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "function_call": ("none", "auto"),
    "grammar": ("",),
    "include_stop_str_in_output": (False,),
    "json_schema": ({},),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "prompt_embeds": ([],),
    "prompt_logprobs": (False,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (-1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}


def _is_supported(field: str, value: Any) -> bool:
    return not field.startswith("guided_") and (field not in UNSUPPORTED or value in UNSUPPORTED[field])


def _is_count(value: int) -> int:
    if value == 0:
        raise ValueError("it must be at least 1, or -1 for no limit")
    return value


_Text = Annotated[str, Field(max_length=4 * 2**20)]
_MaxTokens = Annotated[int, Field(ge=NO_LIMIT, le=MAX_TOKENS), AfterValidator(_is_count)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    def unknown_fields(self) -> list[str]:
        """Those that change nothing. Raises ``UsageError`` for one that would."""
        given = self.__pydantic_extra__ or {}
        for field, value in given.items():
            if not _is_supported(field, value):
                raise UsageError(f"{field} is not supported here with this value; leave it out", field=field)
        return sorted(given)


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="With include_usage: every chunk has the usage so far.")


class GenerateBody(_Body):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: _MaxTokens | None = Field(None, description="-1: as many as there is room for.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 and -1 keep all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_spec_stats: bool | None = Field(None, description="Say how the text came about: drafts, accepted, ...")

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_always(self) -> bool:
        return self.stream_options is not None and self.wants_usage and self.stream_options.continuous_usage_stats

    def params(
        self, defaults: Mapping[str, Any], max_tokens: int, num_logprobs: int | None, choice: int, vocab_size: int
    ) -> SamplingParams:
        """For one choice; what the client leaves open is ``defaults``'. Raises ``UsageError`` that names the field."""
        names = {field.name for field in fields(SamplingParams)}
        given = {key: value for key, value in self.model_dump(include=names).items() if value is not None}
        values = {**defaults, **given, "max_tokens": max_tokens, "num_logprobs": num_logprobs}
        stops = values.pop("stop", ())
        values["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
        values["top_k"] = max(0, values.get("top_k", 0))
        values["stop_token_ids"] = frozenset(values.get("stop_token_ids", ()))
        values["logit_bias"] = _logit_bias(values.get("logit_bias", {}), vocab_size)
        if self.seed is not None:
            values["seed"] = (self.seed + choice) % (MAX_SEED + 1)
        return SamplingParams(**values)


def _logit_bias(given: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise UsageError(
                f"logit_bias: {key[:20]!r} is no token id; they are numbers below {vocab_size}", field="logit_bias"
            )
        biases[int(key)] = bias
    return tuple(biases.items())


class CompletionBody(GenerateBody):
    """``POST /v1/completions``."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_limit(cls, values: Any) -> Any:
        """An absent one means 16 tokens, as at OpenAI."""
        if isinstance(values, dict) and values.get("max_tokens", 0) is None:
            return {**values, "max_tokens": NO_LIMIT}
        return values

    def prompts(self) -> list[str | list[int]]:
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [self.prompt]  # type: ignore[list-item]
            case _:
                return list(self.prompt)  # type: ignore[arg-type]


class Part(_Body):
    """Of a message's content; models here take text only."""

    type: Annotated[str, Field(max_length=64)]
    text: _Text | None = None


class ChatMessage(_Body):
    role: Annotated[str, Field(max_length=64)]
    content: _Text | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it. Raises ``UsageError`` for what is no text."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise UsageError(
                        f"messages: this model takes text only, and a part is of type {part.type!r}", field="messages"
                    )
            content = "".join(part.text or "" for part in content)
        return {**(self.__pydantic_extra__ or {}), "role": self.role, "content": content or ""}


class ChatBody(GenerateBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: _MaxTokens | None = None
    chat_template_kwargs: dict[str, Any] = Field({}, description="For the template, as enable_thinking.")
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _needs_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class TokenizeBody(_Body):
    """``POST /tokenize``: a prompt, or messages in the model's chat template."""

    model: str | None = None
    prompt: _Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt, or messages, and not both")
        return self


class DetokenizeBody(_Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId]
