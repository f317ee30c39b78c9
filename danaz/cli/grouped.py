"""Commands whose options are the fields of a dataclass, so that a command with many options takes one argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from dataclasses import MISSING, fields
from functools import wraps
from typing import Any, TypeVar, get_type_hints

Options = TypeVar("Options")


def takes_options(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorate a function of one ``options`` so that Typer sees a parameter for each field of this dataclass.

    The annotation of a field is that of a Typer parameter; a field without default is required.
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(options)  # type: ignore[arg-type]
    ]

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(command)
        def called_by_typer(**values: Any) -> None:
            command(options(**values))

        called_by_typer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called_by_typer.__annotations__ = hints
        del called_by_typer.__wrapped__  # its signature is not Typer's
        return called_by_typer

    return decorate


def given(options: Any, names: Container[str]) -> dict[str, Any]:
    """The fields of ``options`` that the user has given a value and that are in ``names``."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if name in names and value is not None}
