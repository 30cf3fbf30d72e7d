"""What ``flowspec chat`` wants of whom it talks to."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flowspec.core import SamplingParams

CONTINUED_TOKENS = 128  # of a text that is continued, where nothing else is said

Message = dict[str, str]  # role and content
Tell = Callable[[str], None]  # something that the user should know, in one line


@dataclass(frozen=True)
class Settings:
    """Of the next answers: fields of ``SamplingParams`` by name. What is not given is left to the model, or the server.

    Raises ``UsageError``.
    """

    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params({})

    def changed(self, **given: Any) -> Settings:
        return Settings({**self.given, **given})

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams(**{**defaults, **self.given})


@dataclass(frozen=True)
class Piece:
    """What has become certain of an answer."""

    text: str
    num_tokens: int  # of the answer so far
    accepted_per_draft: float | None = None  # known at the end, if at all


class Talker(Protocol):
    name: str  # of the model

    @property
    def is_gone(self) -> bool:
        """Whether there will be no answer any more."""
        ...

    def reply(self, messages: Sequence[Message], settings: Settings) -> Generator[Piece, None, None]:
        """The answer to the last message, or its continuation by a model without a chat template.

        Closing the iterator cancels the answer, and so does a ``KeyboardInterrupt``. Raises ``FlowspecError``.
        """
        ...


def accepted_per_draft(num_accepted: int, num_drafts: int) -> float | None:
    return num_accepted / num_drafts if num_drafts else None


def only_continues(name: str) -> str:
    return f"{name} has no chat template: what you type is continued, each text by itself"
