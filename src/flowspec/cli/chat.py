"""The command ``chat``: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from flowspec.cli.groups import changed
from flowspec.cli.keyboard import Source, keyboard
from flowspec.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_SAMPLING,
    DEFAULT_STAGE_OPTIONS,
    ApiKey,
    ModelOptions,
    SamplingOptions,
    StageOptions,
    Verbose,
)
from flowspec.cli.terminal import TerminalProgress, errors_in_one_line, stderr
from flowspec.errors import FlowspecError, UsageError
from flowspec.model.demo_pair import DEMO
from flowspec.model.fetched import A_TOY, talking_model
from flowspec.talk.talker import Message, Piece, Settings, Talker
from flowspec.talk.transcript import Transcript, new_file, newest_file

HELP = """\
/system TEXT    how the model should behave; without TEXT, as it likes
/temperature X  0 always takes the most probable token
/reset          forget what was said
/save FILE      write down what was said
/load FILE      go on with what was written down; without FILE, with what was said the last time
/quit           end, as Ctrl-D does
Alt-Enter begins a new line, and so does a backslash at the end of one. Ctrl-C stops an answer."""

_FOR_A_SERVER_TOO = {"--model", "--timeout"}


def chat(
    url: Annotated[
        str | None,
        typer.Option(
            help="A running server, as http://127.0.0.1:8000; --model is then a model's name there.",
            show_default="a model in this process",
        ),
    ] = None,
    api_key: ApiKey = None,
    model: ModelOptions = DEFAULT_MODEL,
    stage_options: StageOptions = DEFAULT_STAGE_OPTIONS,
    system: Annotated[str, typer.Option(help="How the model should behave.")] = "",
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    verbose: Verbose = False,
) -> None:
    """Talk to a model."""
    with errors_in_one_line(verbose), contextlib.ExitStack() as stack:
        settings = Settings(sampling.given())
        talker: Talker
        if url is not None:
            for option in [*changed(model, DEFAULT_MODEL), *changed(stage_options, DEFAULT_STAGE_OPTIONS)]:
                if option not in _FOR_A_SERVER_TOO:
                    raise UsageError(f"{option} is the server's matter; leave it or --url out")
            from flowspec.talk.remote import RemoteTalker

            server = RemoteTalker(url, api_key, model.model, stage_options.timeout, _tell)
            talker = stack.enter_context(contextlib.closing(server))
        else:
            progress = TerminalProgress()
            stack.callback(progress.stop)
            arguments = model.arguments(talking_model()) | stage_options.arguments(model.draft_worker)
            from flowspec.llm import LLM
            from flowspec.talk.local import LocalTalker

            llm = stack.enter_context(LLM(**arguments, progress=progress))
            progress.stop()
            talker = LocalTalker(llm, _tell)
            if model.model is None and talker.name == DEMO:
                _tell(f"{DEMO} is {A_TOY}")
        with keyboard() as source:
            Conversation(talker, settings, system).run(source)


class Conversation:
    """What was said, and what the commands change."""

    def __init__(self, talker: Talker, settings: Settings, system: str) -> None:
        self._talker = talker
        self._settings = settings
        self._system = system
        self._said: list[Message] = []
        self._file: Path | None = None  # where a terminal's conversation is kept, from its first turn on
        self._keeps = True

    def run(self, source: Source) -> None:
        """Until the input ends. At a terminal, an error or Ctrl-C ends one turn; from a pipe, everything."""
        if source.is_interactive:
            _tell(f"{self._talker.name}: /help tells what can be typed, Ctrl-D ends")
        self._keeps = source.is_interactive
        is_leaving = False
        while True:
            try:
                text = source.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not source.is_interactive:
                    raise
                if is_leaving:
                    break
                is_leaving = True
                _tell("Ctrl-C again leaves, as Ctrl-D does")
                continue
            is_leaving = False
            try:
                if text.split()[:1] == ["/quit"]:
                    break
                if not self._obey(text):
                    self._speak(text)
            except FlowspecError as error:
                if not source.is_interactive or self._talker.is_gone:
                    raise
                print(f"flowspec: error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                if not source.is_interactive:
                    raise
        if self._file is not None:
            _tell(f"the conversation is kept in {self._file}; /load takes it up again")

    def _obey(self, text: str) -> bool:
        """Whether it was a command."""
        command, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        match command:
            case "/help":
                _tell(HELP)
            case "/reset":
                self._said, self._file = [], None
            case "/system":
                self._system = rest
            case "/temperature":
                try:
                    self._settings = self._settings.changed(temperature=float(rest))
                except ValueError as error:  # ``UsageError`` is one
                    raise UsageError(f"/temperature {rest}: {error}") from None
            case "/save":
                if not rest:
                    raise UsageError("/save wants a file")
                self._transcript.save(Path(rest).expanduser())
                _tell(f"saved in {rest}")
            case "/load":
                path = Path(rest).expanduser() if rest else newest_file()
                loaded = Transcript.load(path)
                self._said, self._system, self._file = loaded.messages, loaded.system, None
                _tell(f"{path}: {len(self._said)} messages, with {loaded.model}")
            case _ if re.fullmatch("/[a-z]+", command):
                raise UsageError(f"there is no command {command}; /help tells those there are")
            case _:
                return False
        return True

    @property
    def _transcript(self) -> Transcript:
        return Transcript(self._talker.name, self._system, self._said)

    def _add(self, question: Message, answer: str) -> None:
        """A terminal's conversation is kept turn by turn, so that nothing that ends it loses it."""
        self._said += [question, {"role": "assistant", "content": answer}]
        if not self._keeps:
            return
        try:
            self._file = self._file or new_file()
            self._transcript.save(self._file)
        except UsageError as error:
            self._keeps, self._file = False, None
            _tell(f"the conversation is not kept: {error}")

    def _speak(self, text: str) -> None:
        """One turn. What came of an answer that was stopped has been said; of one that failed, nothing has."""
        system: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        question = {"role": "user", "content": text}
        answer = Answer()
        try:
            with contextlib.closing(self._talker.reply([*system, *self._said, question], self._settings)) as pieces:
                answer.show(pieces)
        except FlowspecError:
            answer.end()
            raise
        except KeyboardInterrupt:
            answer.end()
            self._add(question, answer.text)
            raise
        answer.end()
        self._add(question, answer.text)


class Answer:
    """An answer as it comes, and how fast: the user's side of it, whoever talks."""

    def __init__(self) -> None:
        self.text = ""
        self._accepted_per_draft: float | None = None
        self._start_s = time.perf_counter()
        self._first: tuple[float, int] | None = None  # time and number of tokens, as in ``request.emissions``
        self._last = (self._start_s, 0)

    def show(self, pieces: Iterator[Piece]) -> None:
        for piece in pieces:
            self._note(piece)
            sys.stdout.write(piece.text)
            sys.stdout.flush()

    def _note(self, piece: Piece) -> None:
        self.text += piece.text
        self._accepted_per_draft = piece.accepted_per_draft
        if piece.text or piece.num_tokens > self._last[1]:
            self._last = (time.perf_counter(), piece.num_tokens)
            self._first = self._first or self._last

    @property
    def _tokens_per_s(self) -> float:
        """After the first ones; of everything when all came at once."""
        assert self._first is not None
        since_s, num_before = self._first if self._first[1] != self._last[1] else (self._start_s, 0)
        return (self._last[1] - num_before) / (self._last[0] - since_s)

    def end(self) -> None:
        """Whatever comes next begins on a new line."""
        if self.text and not self.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
        if self._first is None:
            return
        figures = f"{self._last[1]} tokens, {self._tokens_per_s:.1f} tokens/s, " if self._last[1] else ""
        figures += f"the first after {(self._first[0] - self._start_s) * 1000:.0f} ms"
        if self._accepted_per_draft is not None:
            figures += f", {self._accepted_per_draft:.2f} accepted per draft"
        _tell(figures)


def _tell(text: str) -> None:
    stderr.print(text, style="dim", markup=False, soft_wrap=True)
