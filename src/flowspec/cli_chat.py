"""The command ``chat``: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer

from flowspec.cli_common import (
    SCHEDULE_NAMES,
    Dtype,
    StatusLine,
    TerminalProgress,
    Verbose,
    errors_in_one_line,
    stderr,
)
from flowspec.config import LinkConfig
from flowspec.errors import FlowspecError, UsageError
from flowspec.talk.talker import Message, Piece, Settings, Talker

HELP = """\
/system TEXT    how the model should behave; without TEXT, as it likes
/temperature X  0 always takes the most probable token
/reset          forget what was said
/quit           end, as Ctrl-D does
A backslash at the end of a line goes on in the next one. Ctrl-C stops an answer."""


def chat(
    url: Annotated[
        str | None, typer.Option(help="A running server, as http://127.0.0.1:8000. [a model in this process]")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FLOWSPEC_API_KEY", help="What the server wants.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model directory, a hub name, or 'demo', the default; with --url, a model's name there."),
    ] = None,
    draft: Annotated[
        str, typer.Option(help="auto, none, ngram, or the directory of an EAGLE head that fits the model.")
    ] = "auto",
    stages: Annotated[int | None, typer.Option(help="Stages to cut the model into, evenly.")] = None,
    workers: Annotated[
        str | None, typer.Option(help="host:port,host:port,... of running workers, in pipeline order.")
    ] = None,
    schedule: Annotated[str, typer.Option(help=f"One of {SCHEDULE_NAMES}.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and arithmetic; float32 is exact.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="Torch device of driver and local workers, as cpu or cuda:0.")] = "cpu",
    system: Annotated[str, typer.Option(help="How the model should behave.")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of one answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [the server's; 0 without one]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this total probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for workers to come up, or for an answer to go on.")
    ] = LinkConfig.stall_timeout_s,
    verbose: Verbose = False,
) -> None:
    """Talk to a model."""
    with errors_in_one_line(verbose), contextlib.ExitStack() as stack:
        settings = Settings(max_new_tokens, temperature, top_p, seed)
        link = LinkConfig(start_timeout_s=timeout, stall_timeout_s=timeout)
        talker: Talker
        if url is not None:
            local = {"--draft": draft != "auto", "--stages": stages, "--workers": workers}
            local |= {"--schedule": schedule != "auto", "--dtype": dtype != Dtype.float32, "--device": device != "cpu"}
            if given := [name for name, is_given in local.items() if is_given]:
                raise UsageError(f"{given[0]} is the server's matter; leave it or --url out")
            from flowspec.talk.server import ServerTalker

            talker = stack.enter_context(contextlib.closing(ServerTalker(url, api_key, model, timeout, _tell)))
        else:
            progress = TerminalProgress()
            stack.callback(progress.stop)
            from flowspec.llm import LLM
            from flowspec.talk.local import LocalTalker

            llm = stack.enter_context(
                LLM(
                    model or "demo",
                    draft=draft,
                    stages=stages,
                    workers=[address.strip() for address in workers.split(",")] if workers else None,
                    schedule=schedule,
                    dtype=dtype.value,
                    device=device,
                    link=link,
                    progress=progress,
                )
            )
            progress.stop()
            talker = LocalTalker(llm, _tell)
        Conversation(talker, settings, system).run()


class Conversation:
    """What was said, and what the commands change."""

    def __init__(self, talker: Talker, settings: Settings, system: str) -> None:
        self._talker = talker
        self._settings = settings
        self._system = system
        self._said: list[Message] = []
        self._is_interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Until the input ends. At a terminal, an error or Ctrl-C ends one turn; from a pipe, everything."""
        if self._is_interactive:
            import readline  # noqa: F401  (lends its line editing to ``input``)

            _tell(f"{self._talker.name}: /help tells what can be typed, Ctrl-D ends")
        for text in _typed(self._is_interactive):
            try:
                if text.split()[0] == "/quit":
                    return
                if not self._obey(text):
                    self._speak(text)
            except FlowspecError as error:
                if not self._is_interactive or self._talker.is_gone:
                    raise
                print(f"flowspec: error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise

    def _obey(self, text: str) -> bool:
        """Whether it was a command."""
        command, _, rest = text.strip().partition(" ")
        match command:
            case "/help":
                _tell(HELP)
            case "/reset":
                self._said = []
            case "/system":
                self._system = rest.strip()
            case "/temperature":
                try:
                    self._settings = replace(self._settings, temperature=float(rest))
                except ValueError as error:  # ``UsageError`` is one
                    raise UsageError(f"/temperature {rest}: {error}") from None
            case _ if re.fullmatch("/[a-z]+", command):
                raise UsageError(f"there is no command {command}; /help tells those there are")
            case _:
                return False
        return True

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
            self._said += [question, {"role": "assistant", "content": answer.text}]
            raise
        answer.end()
        self._said += [question, {"role": "assistant", "content": answer.text}]


class Answer:
    """An answer as it comes, and how fast: the user's side of it, whoever talks."""

    def __init__(self) -> None:
        self.text = ""
        self._accepted_per_draft: float | None = None
        self._start_s = time.perf_counter()
        self._first: tuple[float, int] | None = None  # time and number of tokens, as in ``engine.Stopwatch``
        self._last = (self._start_s, 0)

    def show(self, pieces: Iterator[Piece]) -> None:
        with StatusLine() as status:
            for piece in pieces:
                self._note(piece)
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                if self._last != self._first and piece.num_tokens:
                    status.show(f"{self._tokens_per_s:.1f} tokens/s")

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


def _typed(is_interactive: bool) -> Iterator[str]:
    """What the user types, blank lines left out; at a terminal, Ctrl-C ends it as Ctrl-D does."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    shows_prompt = is_interactive and sys.stdout.isatty()
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if shows_prompt else "")
        except (EOFError, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not is_interactive:
                raise
            if shows_prompt:
                print()
            break
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            if text := "\n".join(lines).strip("\n"):
                yield text
            lines = []
    if lines and not is_interactive:
        yield "\n".join(lines)


def _tell(text: str) -> None:
    stderr.print(text, style="dim", markup=False, soft_wrap=True)
