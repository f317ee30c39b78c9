"""Import what users name as ``package.module:name`` in a config or on the command line: rules, models and data.

If the user's module fails when it is imported, the message says in which line, and holds the traceback of the user's
own code.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

SPEC = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")
DANAZ = str(Path(__file__).parents[1]) + os.sep
STDLIB = sysconfig.get_path("stdlib") + os.sep


class UserModuleError(ValueError):
    """A name that the user gave does not exist, or its module cannot be imported."""


def import_user_name(spec: str, what: str) -> Callable[..., Any]:
    """Return the callable that ``package.module:name`` names. The module is looked for in the current folder first.

    Args:
        spec: the name, as the user wrote it.
        what: how an error message refers to it, such as ``model = 'my_nets:Net'``.

    Raises:
        UserModuleError: there is no such module or no such callable in it, or the module fails when it is imported.
    """
    parsed = SPEC.fullmatch(spec)
    if parsed is None:
        raise UserModuleError(f"{what}: expected package.module:name")
    module_name, name = parsed.groups()
    if module_name.endswith(".py"):
        raise UserModuleError(f"{what}: say the module without .py: {module_name.removesuffix('.py')}:{name}")
    module = _import(module_name, what)
    found = getattr(module, name, None)
    if not callable(found):
        nearest = get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserModuleError(f"{what}: {module_name} has no callable {name!r}{hint}")
    function: Callable[..., Any] = found
    return function


def _import(name: str, what: str) -> ModuleType:
    try:
        return _import_from_here(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UserModuleError(f"{what}: no module {error.name!r} here or on PYTHONPATH") from None
        _raise_as_the_users(error, name, what)


def _import_from_here(name: str) -> ModuleType:
    """Import ``name``, looked for in the current folder first, as ``python -m`` does.

    Afterwards the folder is searched last, so that a file there never replaces what danaz imports later.
    """
    here = os.getcwd()
    if sys.path[:1] in ([here], [""]):
        return import_module(name)
    sys.path.insert(0, here)
    try:
        return import_module(name)
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


def _raise_as_the_users(error: BaseException, module: str, what: str) -> NoReturn:
    report = _without_danaz(traceback.TracebackException.from_exception(error))
    place = _place(error, report.stack)
    where = f"{place[0]}, line {place[1]}," if place else module
    cure = f'mend it; `python -c "import {module}"` tries it alone'
    if isinstance(error, ModuleNotFoundError):
        cure = f"install {error.name} on every machine, or mend the import"
    reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    shown = "".join(report.format()).rstrip()
    raise UserModuleError(f"{what}: {where} fails when it is imported: {reason}; {cure}\n{shown}") from None


def _without_danaz(report: traceback.TracebackException) -> traceback.TracebackException:
    """Remove the frames of danaz and of the import machinery from the report and from the errors that led to it."""
    frames = [frame for frame in report.stack if not _is_ours(frame.filename)]
    report.stack = traceback.StackSummary.from_list(frames)
    for earlier in (report.__cause__, report.__context__):
        if earlier is not None:
            _without_danaz(earlier)
    return report


def _is_ours(file: str) -> bool:
    return file.startswith((DANAZ, "<frozen importlib", f"{STDLIB}importlib{os.sep}"))


def _place(error: BaseException, stack: traceback.StackSummary) -> tuple[str, int] | None:
    """Return file and line of the user's code at fault: the last frame that lies in no library."""
    if isinstance(error, SyntaxError) and error.filename is not None and error.lineno is not None:
        return error.filename, error.lineno
    own = [frame for frame in stack if not _is_library(frame.filename)] or [*stack]
    return (own[-1].filename, own[-1].lineno or 0) if own else None


def _is_library(file: str) -> bool:
    return file.startswith(STDLIB) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
