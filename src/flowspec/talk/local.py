"""A model in this process, to talk to. Knows no terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator, Iterator, Sequence

from flowspec.llm import LLM, Run
from flowspec.talk.talker import CONTINUED_TOKENS, Message, Piece, Settings, Tell, accepted_per_draft, only_continues

LOCAL_TOKENS = 1024  # of an answer, where nothing else is said

_STEP_S = 0.1  # until Ctrl-C is noticed, at most


class LocalTalker:
    def __init__(self, llm: LLM, tell: Tell) -> None:
        self.name = llm.checkpoint.title
        self._llm = llm
        self._can_chat = llm.engine.model.chat_template.is_there
        if not self._can_chat:
            tell(only_continues(self.name))

    @property
    def is_gone(self) -> bool:
        return self._llm.engine.is_closed

    def reply(self, messages: Sequence[Message], settings: Settings) -> Generator[Piece, None, None]:
        engine = self._llm.engine
        llm = self._llm
        prompt_ids = llm.encode_chat(messages) if self._can_chat else llm.encode(messages[-1]["content"])
        max_tokens = LOCAL_TOKENS if self._can_chat else CONTINUED_TOKENS
        defaults = {**engine.served_defaults, "max_tokens": max_tokens}
        run = Run(engine, engine.submit(prompt_ids, settings.params(defaults), is_chat=self._can_chat))
        num_tokens = 0
        try:
            while not run.is_finished:
                with _interrupts_later():
                    news = engine.step(_STEP_S)
                if run.job in news:
                    chunk = run.read()
                    if run.job.error is not None:
                        raise run.job.error
                    num_tokens += len(chunk.token_ids)
                    yield Piece(chunk.text, num_tokens)
        finally:
            if not engine.is_closed:
                with _interrupts_later():
                    engine.cancel(run.job)
        assert run.job.generation is not None
        stats = run.job.generation.stats
        yield Piece("", num_tokens, accepted_per_draft(stats.accepted, stats.verdicts if stats.drafted else 0))


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: an engine that is left in the middle of a step is of no more use."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted:
        raise KeyboardInterrupt
