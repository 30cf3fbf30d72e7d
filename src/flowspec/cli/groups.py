"""A command that takes whole groups of options as parameters, for typer, which knows single options."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, with one option for each field of its parameters that are groups."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.default):
            groups[name] = parameter.default
            parameters += _options_of(parameter.default)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, default in groups.items():
            given[name] = type(default)(**{field.name: given.pop(field.name) for field in fields(default)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: Any) -> list[inspect.Parameter]:
    """A text that stands for a default of ``None`` gives way to a default that is said."""
    hints = get_type_hints(type(group), include_extras=True)
    parameters: list[inspect.Parameter] = []
    for field in fields(group):
        default, hint = getattr(group, field.name), hints[field.name]
        base, option = hint.__origin__, copy.copy(hint.__metadata__[0])
        if default is not None:
            option.show_default = True
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[base, option]
            )
        )
    return parameters


def flag(name: str) -> str:
    """The option of a group's field."""
    return "--" + name.replace("_", "-")


def changed(group: Any, default: Any) -> list[str]:
    """The options of a group that are not as ``default`` has them."""
    names = [field.name for field in fields(group)]
    return [flag(name) for name in names if getattr(group, name) != getattr(default, name)]
