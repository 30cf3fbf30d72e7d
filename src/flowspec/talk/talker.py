"""What ``flowspec chat`` wants of whom it talks to."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from flowspec.core import SamplingParams

CONTINUED_TOKENS = 128  # of a text that is continued, where nothing else is said

Message = dict[str, str]  # role and content
Tell = Callable[[str], None]  # something that the user should know, in one line


@dataclass(frozen=True)
class Settings:
    """Of the next answers; ``None`` leaves the choice to the server, or to the default."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.params(1)  # raises ``UsageError``

    def params(self, max_new_tokens: int) -> SamplingParams:
        """``max_new_tokens``: where nothing else is said."""
        wanted = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return SamplingParams(
            wanted, self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, seed=self.seed
        )


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
