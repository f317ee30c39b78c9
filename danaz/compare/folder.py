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

from pydantic import ValidationError

from danaz.compare.cells import Cell, Comparison, ComparisonError
from danaz.compare.results import read_index
from danaz.files.plain_yaml import dump_yaml
from danaz.files.reading import UnreadableError
from danaz.run import lock as run_lock
from danaz.run.config import Config
from danaz.run.folder import write_atomically, write_settings
from danaz.run.lock import MODE, WAIT_S, locked_run_folder

INDEX = "comparison.yaml"
CELLS = "cells"
LOCK = ".lock"
OR_FRESH = ", or begin again with --fresh, which throws the finished cells away"


class ComparisonFolder:
    """The folder ``path`` of a comparison."""

    def __init__(self, path: Path, has_fresh: bool = False):
        """``has_fresh``: the command that uses it has an option ``--fresh``."""
        self.path = path
        self._or_begin_again = OR_FRESH if has_fresh else ""

    @contextmanager
    def opened_for(self, comparison: Comparison, fresh: bool = False) -> Iterator[None]:
        """Claim the folder, for this process alone; ``fresh`` throws away the cells that it holds.

        Raises ComparisonError if it holds another experiment or other things, or is in use; UnreadableError, OSError.
        """
        self._check_own()
        self.path.mkdir(mode=MODE, parents=True, exist_ok=True)
        with self._locked():
            self._check_own()
            if fresh:
                self._throw_away()
            self._note(comparison)
            yield

    def _check_own(self) -> None:
        others = {path.name for path in self.path.iterdir()} - {LOCK} if self.path.exists() else set()
        if others and INDEX not in others:
            raise ComparisonError(f"{self.path} holds other things than a comparison; give another --out")

    def _throw_away(self) -> None:
        for cell in (self.path / CELLS).glob("*/"):
            with locked_run_folder(cell, WAIT_S):  # by a process whose parent was killed, for a moment
                shutil.rmtree(cell)
        (self.path / INDEX).unlink(missing_ok=True)

    def cell(self, name: str) -> Path:
        return self.path / CELLS / name

    def is_finished(self, cell: Cell) -> bool:
        return (self.cell(cell.name) / "summary.json").exists()

    def begin(self, cell: Cell) -> Path:
        """An empty run folder for a cell that is not finished. Raises RunLockedError if somebody is at work there."""
        folder = self.cell(cell.name)
        folder.mkdir(mode=MODE, parents=True, exist_ok=True)
        with locked_run_folder(folder, WAIT_S):
            _empty(folder)
            write_settings(folder, cell.config.model_dump(mode="json"))
        return folder

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
            yield
        except BlockingIOError:
            raise ComparisonError(
                f"another comparison is at work in {self.path}; wait until it has ended, or give another --out"
            ) from None
        finally:
            os.close(lock)

    def _note(self, comparison: Comparison) -> None:
        """Write comparison.yaml; cells of earlier calls stay in it, in the order in which they were first asked for."""
        index, names = self.path / INDEX, [cell.name for cell in comparison.cells]
        if index.exists():
            before, known = read_index(index)
            self._check_same(before, comparison.config)
            names = [*known, *names]
        content = {"config": comparison.config.model_dump(mode="json"), CELLS: list(dict.fromkeys(names))}
        write_atomically(index, dump_yaml(content).encode())

    def _check_same(self, before: Mapping[str, Any], config: Config) -> None:
        try:
            same = Config.model_validate(before).digest() == config.digest()
        except ValidationError as error:
            raise UnreadableError(self.path / INDEX, f"its config is none of this version ({error})") from None
        if same:
            return
        now = config.model_dump(mode="json")
        changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        raise ComparisonError(
            f"the config has changed since the comparison in {self.path} began ({'; '.join(changed)}). "
            f"Give another --out, or undo the change{self._or_begin_again}"
        )


def _empty(folder: Path) -> None:
    """All but the lock, which this process has."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != run_lock.LOCK:
            path.unlink()
