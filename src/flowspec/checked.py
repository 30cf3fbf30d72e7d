"""Arguments of the public interface, checked against their type hints: a wrong name or type is a ``UsageError``.
And fields of dataclasses, checked against their range.

Knows plain types, literals, tuples, sets, sequences, unions, and classes by ``isinstance``. What it does not know it
lets pass.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from flowspec.errors import FieldError, UsageError

_Class = TypeVar("_Class", bound=type)
_Owner = TypeVar("_Owner")
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
}


def check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:
            raise FieldError(name, f"is {value:.12g}; it must be positive")


def check_at_most(owner: object, name: str, most: int) -> None:
    if (value := getattr(owner, name)) > most:
        raise FieldError(name, f"is {value}; the most is {most}")


def check_not_negative(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value < math.inf:
            raise FieldError(name, f"is {value:.12g}; it must be 0 or positive")


def checked_class(cls: _Class) -> _Class:
    """``checked`` for the constructor."""
    owner: Any = cls
    owner.__init__ = checked(owner.__init__, cls.__name__)
    return cls


def checked(function: Callable[_Parameters, _Result], name: str | None = None) -> Callable[_Parameters, _Result]:
    """Check what a function is given; whole numbers may come as floats, tuples and sets as lists.

    ``name``: as users know the function.
    """
    signature = inspect.signature(function)
    known = [parameter for parameter in signature.parameters if parameter != "self"]
    name = name or function.__name__

    @functools.wraps(function)
    def call(*given: _Parameters.args, **named: _Parameters.kwargs) -> _Result:
        for key in named:
            if key not in known:
                raise UsageError(_unknown(name, key, known))
        try:
            bound = signature.bind(*given, **named)
        except TypeError as error:
            raise UsageError(f"{name}: {error}") from None
        hints = _hints(function)
        for key, value in bound.arguments.items():
            if key != "self":
                bound.arguments[key] = _fitting(key, value, hints[key])
        return function(*bound.args, **bound.kwargs)

    return call


def takes_fields_of(
    spec: Callable[_Parameters, _Result],
) -> Callable[[Callable[[_Owner, _Result], None]], Callable[Concatenate[_Owner, _Parameters], None]]:
    """Of a constructor that is given one dataclass: callers give its fields, as if each were written there."""

    def decorate(init: Callable[[_Owner, _Result], None]) -> Callable[Concatenate[_Owner, _Parameters], None]:
        def construct(owner: _Owner, /, *given: _Parameters.args, **named: _Parameters.kwargs) -> None:
            init(owner, spec(*given, **named))

        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        taken, hints = inspect.signature(spec).parameters, get_type_hints(spec)
        written: Any = construct
        written.__signature__ = inspect.Signature([itself, *taken.values()])
        written.__annotations__ = {name: hints[name] for name in taken}
        return construct

    return decorate


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    return get_type_hints(function)


def _unknown(owner: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    return f"{owner} has no {name}; {advice}"


def _fitting(name: str, value: Any, hint: Any) -> Any:
    """The value, as the type that the hint asks for. Raises ``UsageError``."""
    try:
        return _converted(value, hint)
    except TypeError:
        raise UsageError(f"{name} is {value!r}; it must be {_described(hint)}", field=name) from None


def _converted(value: Any, hint: Any) -> Any:
    """Raises ``TypeError``."""
    if type(value) is hint:
        return value
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, inner)
    if origin is Literal:
        return _required(value, value in inner)
    if hint is float:
        _required(value, isinstance(value, numbers.Real) and not isinstance(value, bool))
        return value if isinstance(value, (int, float)) else float(value)
    if hint is int:
        is_whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1
        return int(_required(value, is_whole))
    if origin is tuple:
        items: list[Any] = list(_required(value, isinstance(value, (tuple, list))))
        repeated = len(inner) == 2 and inner[1] is Ellipsis
        _required(value, repeated or len(items) == len(inner))
        return tuple(_converted(item, inner[0 if repeated else i]) for i, item in enumerate(items))
    if origin is frozenset:
        _required(value, isinstance(value, (set, frozenset, tuple, list)))
        return frozenset(_converted(item, inner[0]) for item in value)
    if origin is collections.abc.Sequence:
        _required(value, isinstance(value, collections.abc.Sequence) and not isinstance(value, (str, bytes)))
        return [_converted(item, inner[0]) for item in value]
    if origin is collections.abc.Mapping:
        return _required(value, isinstance(value, collections.abc.Mapping))
    if origin is collections.abc.Callable:
        return _required(value, callable(value))
    if origin is None and isinstance(hint, type):
        return _required(value, _is_instance(value, hint))
    return value


def _one_of(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _converted(value, hint)
        except TypeError:
            continue
    raise TypeError


def _is_instance(value: Any, cls: type) -> bool:
    """Of a protocol whatever has its members is one."""
    if not getattr(cls, "_is_protocol", False):
        return isinstance(value, cls)
    members: Mapping[str, Any] = {**getattr(cls, "__annotations__", {}), **vars(cls)}
    return all(hasattr(value, name) for name in members if not name.startswith("_"))


def _required(value: Any, is_right: bool) -> Any:
    if not is_right:
        raise TypeError
    return value


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in inner)
    if origin is Literal:
        return " or ".join(repr(value) for value in inner)
    if origin in (tuple, frozenset, collections.abc.Sequence) and inner:
        items = [_described(part) for part in inner if part is not Ellipsis]
        return f"a pair of {' and '.join(items)}" if len(items) > 1 else f"a list, of which each is {items[0]}"
    if origin is collections.abc.Callable:
        return "a function"
    if origin is collections.abc.Mapping:
        return "a dictionary"
    return _NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")
