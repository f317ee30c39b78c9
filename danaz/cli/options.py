"""Turns declared options into parameters of Typer commands, and declares those that only commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from danaz.launch.options import PANELS
from danaz.options import shared
from danaz.options.option import MOST, Option, options_of
from danaz.run.schedules import SCHEDULE_FORMS, SCHEDULES


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of ``command`` that is a dataclass by one option for each field of the dataclass."""
    hints = get_type_hints(command, include_extras=True)
    params: list[Parameter] = []
    kinds: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    for name, param in inspect.signature(command).parameters.items():
        params += _parameters(kinds[name]) if name in kinds else [param.replace(annotation=hints[name])]

    @wraps(command)
    def run(**values: Any) -> None:
        for name, kind in kinds.items():
            values[name] = kind(**{field: values.pop(field) for field in options_of(kind)})
        command(**values)

    run.__signature__ = Signature([p.replace(kind=Parameter.KEYWORD_ONLY) for p in params])  # type: ignore[attr-defined]
    run.__annotations__ = {param.name: param.annotation for param in params}
    return run


def _parameters(kind: Any) -> list[Parameter]:
    """Return the fields of a dataclass as parameters of a Typer command, panel after panel."""
    required = {MISSING: Parameter.empty}
    defaults = {field.name: required.get(field.default, field.default) for field in fields(kind)}
    options = sorted(options_of(kind).items(), key=lambda item: _order(item[1][1].panel))
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=defaults[name],
            annotation=Annotated[type_, typer_option(name, option)],
        )
        for name, (type_, option) in options
    ]


def _order(panel: str | None) -> int:
    return PANELS.index(panel) if panel in PANELS else len(PANELS)


def typer_option(name: str, option: Option) -> Any:
    """Return what Typer must know of the option of the field ``name``."""
    if option.argument:
        return typer.Argument(help=option.help, metavar=f"[{option.flags[0]}]")
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    return typer.Option(
        *flags,
        help=option.help,
        rich_help_panel=option.panel,
        metavar=option.metavar,
        min=option.min,
        max=None if option.max == MOST else option.max,  # a reader learns nothing from a range up to 2147483647
        exists=option.exists,
        envvar=option.variable,
    )


# ---- what is trained -------------------------------------------------------------------------------------------------

Experiment = Annotated[Path, typer.Argument(help="YAML of an experiment, e.g. configs/digits.yaml", metavar="CONFIG")]

# ---- simulated workers -----------------------------------------------------------------------------------------------


def _of_the_config(option: Option, *values: str) -> Option:
    """Return the option of a config's key with its values and its default on a command line."""
    values_of = f": {', '.join(values)}" if values else ""
    return replace(option, help=f"{option.help}{values_of}. Default: the config's")


SCHEDULE = _of_the_config(shared.SCHEDULE, *SCHEDULES, *SCHEDULE_FORMS.values())
DEVICE = _of_the_config(shared.DEVICE)
WORKERS = replace(shared.WORKERS, min=None, max=None)  # the config checks the number, and its error says more
JOBS = Option("Simulations at a time. Default: one a core", ("--jobs", "-j"), min=1)
