"""comparison.yaml: the config that all cells of a comparison share, and the names of the cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from danaz.files.atomic import write_atomically
from danaz.files.plain_yaml import dump_yaml
from danaz.files.reading import UnreadableError, read_yaml

INDEX = "comparison.yaml"  # in the folder of a comparison
CELLS = "cells"  # its key, and the folder beside it that holds a run folder for each cell


def read_index(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the shared config of the comparison in ``folder``, and the names of its cells. Raises UnreadableError."""
    path = folder / INDEX
    index = read_yaml(path)
    config, names = index.get("config"), index.get(CELLS)
    if not isinstance(config, dict) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnreadableError(path, f"expected the keys config, with keys and values, and {CELLS}, a list of names")
    return config, names


def write_index(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write comparison.yaml; a name that occurs twice is kept once. Raises OSError."""
    content = {"config": dict(config), CELLS: list(dict.fromkeys(names))}
    write_atomically(folder / INDEX, dump_yaml(content).encode())
