"""How an option of a run is declared: once, beside the field that holds its value.

The field gives name, type and default; :class:`Option` says the rest. The command line, the limits and the help of a
config's keys, what `danaz launch --resume` may change and what launch.yaml keeps follow from it. The options that
configs and processes know too are in danaz/options/shared.py, and the others in the class of their command.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

LARGEST_SEED = 2**63 - 1  # torch takes a little more, and what is made of it must fit too
MOST = 2**31 - 1  # of anything that is counted
MOST_PROCESSES = 1 << 16

# "may change": launch.yaml keeps the value, and a resumed run may be given another one. "fixed": what a run trains, it
# trains to its end. "given again": nothing is kept, for it concerns one command, or may be a secret.
OnResume = Literal["may change", "fixed", "given again"]

Class = TypeVar("Class")


@dataclass(frozen=True)
class Option:
    """What a field cannot say itself. Limits are inclusive."""

    help: str  # shown by --help, and by an error in a config
    flags: tuple[str, ...] = ()  # as typed; none: -- and the name of the field
    panel: str | None = None  # of --help; None: the first one
    metavar: str | None = None  # unit or form of the value, shown in its place: SECONDS, HOST:PORT
    min: float | None = None
    max: float | None = None
    exists: bool = False  # a file that must be there
    argument: bool = False  # typed without a flag
    variable: str | None = None  # of the environment, which gives the value if the command line does not
    key: str | None = None  # in launch.yaml; None: the name of the field
    on_resume: OnResume = "may change"
    since: str | None = None  # version that added it; run folders of earlier ones lack it, and go on with the default

    def words(self, name: str) -> str:
        """Return how a sentence names the option of the field ``name``."""
        if self.argument:
            return f"the {self.flags[0]}"
        long = [flag for flag in self.flags if flag.startswith("--")]
        return (long or self.flags or (f"--{name.replace('_', '-')}",))[0].partition("/")[0]

    # pydantic reads the limits of an Annotated field by this protocol of annotated_types.
    __is_annotated_types_grouped_metadata__ = True

    def __iter__(self) -> Iterator[object]:
        from annotated_types import Ge, Le

        if self.min is not None:
            yield Ge(self.min)
        if self.max is not None:
            yield Le(self.max)


def declared(kind: type[Any]) -> dict[str, tuple[Any, Option]]:
    """Return name -> (type, option) of each annotated name of a class and its bases that has an option."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        options = [part for part in get_args(hint)[1:] if isinstance(part, Option)]
        if get_origin(hint) is Annotated and len(options) == 1:
            found[name] = (get_args(hint)[0], options[0])
    return found


def options_of(kind: type[Any]) -> dict[str, tuple[Any, Option]]:
    """Return name -> (type, option) of each field of a dataclass, in order.

    Raises TypeError for a field without an option.
    """
    found = declared(kind)
    for field in fields(kind):
        if field.name not in found:
            raise TypeError(f"{kind.__name__}.{field.name} should be Annotated with one Option")
    return {field.name: found[field.name] for field in fields(kind)}


def newer_names(kind: type[Any]) -> set[str]:
    """Return the names of the options that the files of an earlier version may lack."""
    return {name for name, (_, option) in declared(kind).items() if option.since is not None}


def overriding(kind: type[Any]) -> Callable[[type[Class]], type[Class]]:
    """Give the decorated class the options of the dataclass ``kind``, each None until the user gives it a value."""

    def add(to: type[Class]) -> type[Class]:
        for name, (type_, option) in options_of(kind).items():
            to.__annotations__[name] = Annotated[type_ | None, option]
            setattr(to, name, None)
        return to

    return add


def given(options: Any, names: Container[str]) -> dict[str, Any]:
    """Return the fields of ``options`` that the user has given a value and whose names are among ``names``."""
    values = {name: getattr(options, name) for name in options_of(type(options))}
    return {name: value for name, value in values.items() if name in names and value is not None}
