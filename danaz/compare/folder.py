"""A comparison on disk: comparison.yaml, cells/<name>/ (a run folder each), and the report.

A cell is finished when its summary.json is there; whatever else is in its folder is begun anew. So a comparison can be
stopped at any moment, and the same command goes on with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from danaz.compare.cells import Cell, Comparison, ComparisonError
from danaz.config import Config
from danaz.run_folder import write_atomically, write_settings

INDEX = "comparison.yaml"
CELLS = "cells"


class ComparisonFolder:
    """The folder ``path`` of a comparison."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def opened_for(self, comparison: Comparison, fresh: bool = False) -> Iterator[None]:
        """Claim the folder, for this process alone; ``fresh`` throws away the cells that it holds.

        Raises ComparisonError if it holds another experiment or other things, or is in use.
        """
        if self.path.exists() and not (self.path / INDEX).exists() and any(self.path.iterdir()):
            raise ComparisonError(f"{self.path} holds other things than a comparison; give another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if fresh:
                shutil.rmtree(self.path / CELLS, ignore_errors=True)
                (self.path / INDEX).unlink(missing_ok=True)
            self._note(comparison)
            yield

    def cell(self, name: str) -> Path:
        return self.path / CELLS / name

    def is_finished(self, cell: Cell) -> bool:
        return (self.cell(cell.name) / "summary.json").exists()

    def begin(self, cell: Cell) -> Path:
        """An empty run folder for a cell that is not finished."""
        folder = self.cell(cell.name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_settings(folder, cell.config.model_dump(mode="json"))
        return folder

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
            yield
        except BlockingIOError:
            raise ComparisonError(
                f"another `danaz compare` is at work in {self.path}; wait, or give another --out"
            ) from None
        finally:
            os.close(lock)

    def _note(self, comparison: Comparison) -> None:
        """Write comparison.yaml; cells of earlier calls stay in it, in the order in which they were first asked for."""
        known = self._read()
        if known is not None:
            self._check_same(known["config"], comparison.config)
        names = [*(known or {}).get(CELLS, ()), *(cell.name for cell in comparison.cells)]
        content = {"config": comparison.config.model_dump(mode="json"), CELLS: list(dict.fromkeys(names))}
        write_atomically(self.path / INDEX, yaml.safe_dump(content, sort_keys=False).encode())

    def _read(self) -> dict[str, Any] | None:
        index = self.path / INDEX
        return yaml.safe_load(index.read_text()) if index.exists() else None

    def _check_same(self, before: Mapping[str, Any], config: Config) -> None:
        if Config.model_validate(before).digest() == config.digest():
            return
        now = config.model_dump(mode="json")
        changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        raise ComparisonError(
            f"the config has changed since the comparison in {self.path} began ({'; '.join(changed)}). "
            "Give another --out, undo the change, or begin again with --fresh, which throws the finished cells away"
        )
