"""Checks for data from another machine. Each check takes a value and returns it in the form in which we use it.

If the value is wrong, the check raises ValueError with words for what it expected, such as `seconds from 0 to 100`.
Text that passes is safe to show: it holds nothing that would make a terminal do more than print it.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "MOST_NAME",
    "MOST_WORDS",
    "NAME",
    "Check",
    "FieldError",
    "address",
    "check_fields",
    "flag",
    "integer",
    "name",
    "number",
    "optional",
    "read_object",
    "record",
    "shown",
    "words",
]

Check = Callable[[Any], Any]  # checks one field: value -> value as used. Raises ValueError(what was expected).

MOST_NAME = 255  # characters in a name of a process or file, or in an address
MOST_WORDS = 4096  # characters in an explanation
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and lone surrogates
MOST_SHOWN = 80  # how many characters of a wrong value are shown
NAME = re.compile(rf"[\x21-\x7e]{{1,{MOST_NAME}}}")


class FieldError(ValueError):
    """A field that is missing, unknown or wrong; the message names it and says what was expected."""


def check_fields(
    values: Mapping[str, object], checks: Mapping[str, Check], others: Check | None = None
) -> dict[str, Any]:
    """Check every field of `values`. Fields that `checks` does not name must pass `others`; None allows no such fields.

    Raises FieldError.
    """
    missing = sorted(checks.keys() - values.keys())
    unknown = sorted(values.keys() - checks.keys()) if others is None else []
    if missing:
        raise FieldError(f"{shown(missing[0])} is missing")
    if unknown:
        raise FieldError(f"{shown(unknown[0])} is not known")
    return {key: _checked(key, value, checks.get(key, others)) for key, value in values.items()}


def _checked(key: str, value: object, check: Check | None) -> Any:
    assert check is not None
    try:
        return check(value)
    except ValueError as error:
        raise FieldError(f"{shown(key)} is {shown(value)}; expected {error}") from error


def read_object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`. Raises FieldError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise FieldError(f"{shown(text)} is not JSON") from None
    if not isinstance(found, dict):
        raise FieldError(f"{shown(text)} is not a JSON object")
    return found


def shown(value: object) -> str:
    """Return a wrong value, escaped and shortened for an error message."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


# ---- the checks ------------------------------------------------------------------------------------------------------


def integer(low: int, high: int) -> Check:
    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float, unit: str) -> Check:
    """Return a check for a finite number of `unit`, such as seconds."""

    def check(value: object) -> float:
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):  # type: ignore[operator, arg-type]
            raise ValueError(f"{unit} from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    return check


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def name(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"1 to {MOST_NAME} printable ASCII characters without spaces")
    return value


def words(value: object) -> str:
    """Accept text, and replace its control characters by escapes."""
    if not isinstance(value, str) or len(value) > MOST_WORDS:
        raise ValueError(f"text of at most {MOST_WORDS} characters")
    return UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], value)


def address(value: object) -> str:
    try:
        return str(ipaddress.ip_address(name(value)))
    except ValueError:
        raise ValueError("an IP address") from None


def optional(check: Check) -> Check:
    """Return a check for null, or what `check` accepts."""
    return lambda value: None if value is None else check(value)


def record(checks: Mapping[str, Check]) -> Check:
    """Return a check for an object with exactly these fields."""

    def check(value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"an object with {', '.join(checks)}")
        return check_fields(value, checks)

    return check
