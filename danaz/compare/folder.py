"""A comparison on disk: comparison.yaml, cells/<name>/ (a run folder each), and the report.

A cell is finished when its summary.json exists. A cell that is not finished starts again from the beginning. A
comparison can therefore be stopped at any moment; the same command continues it.
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
from danaz.compare.index import CELLS, INDEX, read_index, write_index
from danaz.files.reading import UnreadableError
from danaz.run import lock as run_lock
from danaz.run.config import Config
from danaz.run.folder import write_settings
from danaz.run.lock import MODE, WAIT_S, locked_run_folder

LOCK = ".lock"
OR_FRESH = ", or start again with --fresh, which deletes the finished cells"


class ComparisonFolder:
    """The folder ``path`` of a comparison."""

    def __init__(self, path: Path, has_fresh: bool = False):
        """``has_fresh``: the command that uses the folder has an option ``--fresh``, which messages may advise."""
        self.path = path
        self._or_start_again = OR_FRESH if has_fresh else ""

    @contextmanager
    def opened_for(self, comparison: Comparison, fresh: bool = False) -> Iterator[None]:
        """Lock the folder for this process and write comparison.yaml; ``fresh`` first deletes the cells in it.

        Raises ComparisonError if the folder holds another experiment or other files, or if another process uses it;
        also UnreadableError and OSError.
        """
        self._check_contents()
        self.path.mkdir(mode=MODE, parents=True, exist_ok=True)
        with self._locked():
            self._check_contents()
            if fresh:
                self._delete_cells()
            self._record(comparison)
            yield

    def _check_contents(self) -> None:
        others = {path.name for path in self.path.iterdir()} - {LOCK} if self.path.exists() else set()
        if others and INDEX not in others:
            raise ComparisonError(f"{self.path} is not empty and holds no comparison; give another --out")

    def _delete_cells(self) -> None:
        for cell in (self.path / CELLS).glob("*/"):
            with locked_run_folder(cell, WAIT_S):  # a process whose parent was killed may hold the lock for a moment
                shutil.rmtree(cell)
        (self.path / INDEX).unlink(missing_ok=True)

    def cell(self, name: str) -> Path:
        """Return the run folder of the cell ``name``."""
        return self.path / CELLS / name

    def is_finished(self, cell: Cell) -> bool:
        return (self.cell(cell.name) / "summary.json").exists()

    def begin(self, cell: Cell) -> Path:
        """Make an empty run folder for an unfinished cell. Raises RunLockedError if another process uses it."""
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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, in whatever way
            yield
        except BlockingIOError:
            raise ComparisonError(
                f"another comparison is running in {self.path}; wait until it has ended, or give another --out"
            ) from None
        finally:
            os.close(lock)

    def _record(self, comparison: Comparison) -> None:
        """Write comparison.yaml. Cells of earlier calls stay in it, in the order in which they were first asked for."""
        names = [cell.name for cell in comparison.cells]
        if (self.path / INDEX).exists():
            before, known = read_index(self.path)
            self._check_same(before, comparison.config)
            names = [*known, *names]
        write_index(self.path, comparison.config.model_dump(mode="json"), names)

    def _check_same(self, before: Mapping[str, Any], config: Config) -> None:
        try:
            same = Config.model_validate(before).digest() == config.digest()
        except ValidationError as error:
            raise UnreadableError(
                self.path / INDEX, f"this version of danaz does not accept its config ({error}); give another --out"
            ) from None
        if same:
            return
        now = config.model_dump(mode="json")
        changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        raise ComparisonError(
            f"the config has changed since the comparison in {self.path} began ({'; '.join(changed)}). "
            f"Give another --out, or undo the change{self._or_start_again}"
        )


def _empty(folder: Path) -> None:
    """Delete all files but the lock, which this process holds."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != run_lock.LOCK:
            path.unlink()
