"""The exceptions that flowspec raises for a user's, a file's, or a peer's mistake.

A broken promise of our own code is an ``AssertionError`` instead. Every message says what is wrong and what to do next;
the command line prints it as one line.
"""

from collections.abc import Sequence

NO_CHAT_TEMPLATE = "no_chat_template"
TOO_LONG = "context_length_exceeded"  # OpenAI's


class FlowspecError(Exception):
    """Base of all errors that a caller may want to catch; exit code 1 on the command line."""

    exit_code = 1


class UsageError(FlowspecError, ValueError):
    """The caller asked for something impossible (arguments, prompt, partition); exit code 2.

    ``field``: the argument that is wrong, by the name that the caller gave it, where it is one alone. ``code``: for
    programs that have to tell this error from others, one of the constants here.
    """

    exit_code = 2

    def __init__(self, text: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(text)
        self.field, self.code = field, code


class FieldError(UsageError):
    """A field out of its range. The message starts with the field; whoever read a file adds where it stands."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field, self._problem = field, problem

    def __reduce__(self) -> tuple[type["FieldError"], tuple[str, str]]:
        """For other processes, where exceptions are made again of their text alone."""
        return type(self), (self.field, self._problem)


class ModelError(UsageError):
    """A model or draft directory cannot be used: missing, truncated, unsupported, or not fitting together."""


class DoesNotFitError(UsageError):
    """Weights are larger than the memory of the device that is to hold them."""


class ProtocolError(FlowspecError):
    """A peer sent bytes that are no message of ours, or a message that breaks the protocol."""


class WorkerError(FlowspecError):
    """A worker never came up, failed, or was lost during a run; ``stages``: whose, where that is known."""

    def __init__(self, text: str, stages: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.stages = tuple(stages)


class WorkerEndedError(WorkerError):
    """A process that was started here has ended, and another one has taken its place."""


class BusyError(WorkerError):
    """A worker serves another driver, or has not noticed yet that an earlier session is over."""


class RequestError(FlowspecError):
    """One request met a fault, here or at a worker, and has ended; all others go on."""

    @classmethod
    def of(cls, error: Exception) -> FlowspecError:
        """What a caller is told of whatever ended a request: an error of ours as it is, any other one as a bug."""
        if isinstance(error, FlowspecError):
            return error
        return cls(f"this request met a bug, which ends no other one ({described(error)})")


class NumericalError(RequestError):
    """The model's numbers have overflowed or are damaged: no token can be chosen by them."""


def require(is_so: bool, problem: str) -> None:
    """Raises ``ProtocolError`` where it is not so."""
    if not is_so:
        raise ProtocolError(problem)


def described(error: Exception) -> str:
    """In one text: an error of ours says all, any other one needs its type."""
    return str(error) if isinstance(error, FlowspecError) else f"{type(error).__name__}: {error}"


def shortened(text: str, limit: int = 300) -> str:
    """Somebody else's text for one line of a log or a message: control characters escaped, and cut."""
    kept = text[:limit].encode("utf-8", "backslashreplace").decode()
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    return kept if len(text) <= limit else f"{kept}... ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """Of another library's error, whose text may be a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
