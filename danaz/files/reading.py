"""Read files that danaz or anybody else wrote. Whatever is wrong becomes one sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danaz.files.plain_yaml import YamlError, parse_yaml

if TYPE_CHECKING:
    from torch import Tensor


class UnreadableError(ValueError):
    """A file that is missing, damaged, or not what it should be; the message names it and says what is wrong."""

    def __init__(self, path: Path, why: object):
        super().__init__(f"{path} cannot be used: {why}")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises UnreadableError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableError(path, error.strerror or error) from None
    except ValueError as error:
        raise UnreadableError(path, f"it is no text in UTF-8 ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds. Raises UnreadableError."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        why = f"it is not valid JSON ({error})" if text.strip() else "it is empty"
        raise UnreadableError(path, why) from None
    except RecursionError:
        raise UnreadableError(path, "it is not valid JSON (nested too deeply)") from None
    return _mapping(path, value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises UnreadableError."""
    try:
        value = parse_yaml(read_text(path))
    except YamlError as error:
        raise UnreadableError(path, f"it is not valid YAML ({error})") from None
    return _mapping(path, value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU. Raises UnreadableError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UnreadableError(path, error.strerror or error) from None
    except (SafetensorError, ValueError) as error:
        raise UnreadableError(path, f"it is no whole safetensors file ({error})") from None


def _mapping(path: Path, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UnreadableError(path, "it should hold keys and their values")
    return value
