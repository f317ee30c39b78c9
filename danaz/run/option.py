"""How an option of a run is declared: once, beside the field that holds its value.

The field gives name, type and default; :class:`Option` says the rest. The command line, what `danaz launch --resume`
may change and what launch.yaml keeps follow from it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

LARGEST_SEED = 2**63 - 1  # torch takes a little more, and what is made of it must fit too

# "may change": launch.yaml keeps the value, and a resumed run may be given another one. "fixed": what a run trains, it
# trains to its end. "given again": nothing is kept, for it concerns one command, or may be a secret.
OnResume = Literal["may change", "fixed", "given again"]


@dataclass(frozen=True)
class Option:
    """What a field cannot say itself. Limits are inclusive."""

    help: str  # shown by --help
    flags: tuple[str, ...] = ()  # as typed; none: -- and the name of the field
    panel: str | None = None  # of --help; None: the first one
    metavar: str | None = None  # unit or form of the value, shown in its place: SECONDS, HOST:PORT
    min: float | None = None
    max: float | None = None
    exists: bool = False  # a file that must be there
    argument: bool = False  # typed without a flag
    on_resume: OnResume = "may change"

    def words(self, name: str) -> str:
        """How a sentence names the option of the field ``name``."""
        if self.argument:
            return f"the {self.flags[0]}"
        long = [flag for flag in self.flags if flag.startswith("--")]
        return (long or self.flags or (f"--{name.replace('_', '-')}",))[0].partition("/")[0]


def options_of(kind: type[Any]) -> dict[str, tuple[Any, Option]]:
    """Name -> (type, option) of each field of a dataclass, in order. Raises TypeError for a field without an option."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for field in fields(kind):
        hint = hints[field.name]
        options = [part for part in get_args(hint)[1:] if isinstance(part, Option)]
        if get_origin(hint) is not Annotated or len(options) != 1:
            raise TypeError(f"{kind.__name__}.{field.name} should be Annotated with one Option")
        found[field.name] = (get_args(hint)[0], options[0])
    return found


def given(options: Any, names: Container[str]) -> dict[str, Any]:
    """The fields of ``options`` that the user has given a value and whose names are among ``names``."""
    values = {name: getattr(options, name) for name in options_of(type(options))}
    return {name: value for name, value in values.items() if name in names and value is not None}
