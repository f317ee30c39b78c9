"""Options that several commands share: each is named, and explained, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from danaz.launch.options import OVERRIDES, PANELS, RECORD
from danaz.run.option import Option, options_of
from danaz.run.schedules import SCHEDULE_FORMS, SCHEDULES


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is a dataclass by one option for each of its fields."""
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
    """Its fields as parameters of a Typer command, panel after panel."""
    defaults = {field.name: field.default for field in fields(kind)}
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
    """What Typer must know of the option of the field ``name``."""
    if option.argument:
        return typer.Argument(help=option.help, metavar=f"[{option.flags[0]}]")
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    return typer.Option(
        *flags,
        help=option.help,
        rich_help_panel=option.panel,
        metavar=option.metavar,
        min=option.min,
        max=option.max,
        exists=option.exists,
    )


# ---- what is trained -------------------------------------------------------------------------------------------------

Experiment = Annotated[Path, typer.Argument(help="YAML of an experiment, e.g. configs/digits.yaml", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer_option("overrides", OVERRIDES)]
Record = Annotated[bool, typer_option("record", RECORD)]

# ---- simulated workers -----------------------------------------------------------------------------------------------

WORKERS = Option("Number of simulated workers", ("--workers", "-n"))
SCHEDULE = Option(
    f"Order in which simulated workers push: {', '.join((*SCHEDULES, *SCHEDULE_FORMS.values()))}. Default: the config's"
)
DEVICE = Option("`cpu`, `cuda` or `auto`: a GPU if there is one. Default: the config's, `auto`")
JOBS = Option("Simulations at a time. Default: one a core", ("--jobs", "-j"), min=1)
Workers = Annotated[int | None, typer_option("workers", WORKERS)]
Jobs = Annotated[int | None, typer_option("jobs", JOBS)]
