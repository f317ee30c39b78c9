"""A run on disk: config.yaml, updates.jsonl, summary.json, parameters.safetensors, logs/.

A kill at any moment leaves whole JSON only: files appear under their name when complete, and each line of updates.jsonl
is written whole, before the worker hears of its update: so it is the server's journal, too.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from danaz.server.core import ServerCore
from danaz.server.figures import Update


class RunFolderError(ValueError):
    """A run folder that cannot be used."""


def free_run_folder(out: Path | None, name: str) -> Path:
    """Where a new run may go: ``out``, or runs/TIME-NAME. Raises RunFolderError if a run is in it already."""
    if out is None:
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
        out = next(p for n in range(1000) if not (p := Path("runs", stem + (f"-{n}" if n else ""))).exists())
    if (out / "updates.jsonl").exists() or (out / "summary.json").exists():
        raise RunFolderError(f"{out} already holds a run; give another --out, or move it away")
    return out


def write_atomically(path: Path, content: bytes) -> None:
    """The file at ``path`` holds all of ``content``, or what it held before."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.yaml, the resolved configuration."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False).encode())


class RunFolder:
    """Writes what a server core lives through."""

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        """``facts`` are the figures of summary.json that the server does not know, such as the seed."""
        self.path = path
        self.facts = dict(facts)
        self._journal = path / "updates.jsonl"
        self._reported = path / "reported.json"

    @cached_property
    def _updates(self) -> int:
        """The journal, for writing. A server that never came to know of its run leaves none, which may be elsewhere."""
        return os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def record(self, update: Update) -> None:
        """Add a line to updates.jsonl."""
        line: dict[str, Any] = {
            "version": update.version,
            "worker": update.worker,
            "lag": update.lag,
            "lr": update.lr[0] if len(update.lr) == 1 else update.lr,
            "gap": update.gap,
            "gap_of": update.gap_of,
            "loss": update.loss,
            "batch": update.batch,
        }
        line |= {"samples": update.samples, "incarnation": update.incarnation, "request": update.request}
        # What is seldom there is left out.
        rare = {"round": update.round, "earlier": update.earlier, "life": update.life}
        line |= {name: value for name, value in rare.items() if value}
        content = (json.dumps(line) + "\n").encode()
        while content:
            content = content[os.write(self._updates, content) :]

    def journal(self, after: int) -> list[Update]:
        """The updates behind version ``after``, as far as they follow each other without a hole."""
        updates: list[Update] = []
        if not self._journal.exists():
            return updates
        with self._journal.open("rb") as lines:
            for version, line in enumerate(islice(lines, after, None), after + 1):
                update = _update_of(line)
                if update is None or update.version != version:
                    break
                updates.append(update)
        return updates

    def cut(self, version: int) -> int:
        """Let updates.jsonl end with ``version``; returns how many lines went."""
        lines = self._journal.read_bytes().splitlines(keepends=True) if self._journal.exists() else []
        os.ftruncate(self._updates, sum(map(len, lines[:version])))
        return max(0, len(lines) - version)

    def keep_reported(self, reported: Mapping[str, Any]) -> None:
        """Let what scripts have reported outlive this process; summary.json takes it over."""
        part = self._reported.with_suffix(".part")
        part.write_text(json.dumps(dict(reported)))
        part.replace(self._reported)

    def reported(self) -> dict[str, Any]:
        """What scripts had reported to a server that did not come to write summary.json."""
        try:
            reported: dict[str, Any] = json.loads(self._reported.read_bytes())
        except FileNotFoundError:
            return {}
        return reported

    def forget_reported(self) -> None:
        self._reported.unlink(missing_ok=True)

    def finish(self, core: ServerCore) -> dict[str, Any]:
        """Write the final parameters and summary.json; returns the summary as read_summary would."""
        os.close(self._updates)
        if core.started:
            params = core.whole.params(core.master.params)
            if params is not None:
                named = core.whole.layout.named(params, core.mean_buffers())
                write_atomically(self.path / "parameters.safetensors", save(named))
        figures = core.summary()
        error = _measured(figures["reported"], "test_error_percent", None)
        summary = {**self.facts, "test_error_percent": error, **figures}
        write_atomically(self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        self.forget_reported()
        return with_measured(summary)


def _update_of(line: bytes) -> Update | None:
    """The inverse of RunFolder.record; None if the line is none, such as one cut short by a full disk."""
    try:
        values = json.loads(line)
        values["lr"] = tuple(values["lr"]) if isinstance(values["lr"], list) else (values["lr"],)
        values["earlier"] = tuple(values.get("earlier", ()))
        return Update(**values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run, as with_measured has it. Raises OSError; ValueError if it is none."""
    path = folder / "summary.json"
    try:
        summary: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}; danaz writes it whole, so it was changed since") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path} is no summary of a run: expected a JSON object; it was changed since it was written")
    return with_measured(summary)


def with_measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary, in which the training loss that a script measured on the trained model stands in for the server's.

    The server's own, the mean of the workers' last losses, is an estimate. In a folder of an earlier version, what was
    reported stands among the other figures already.
    """
    loss = _measured(summary.get("reported", {}), "final_train_loss", summary.get("final_train_loss"))
    return {**summary, "final_train_loss": loss}


def _measured(reported: Mapping[str, Any], name: str, otherwise: float | None) -> float | None:
    """A reported figure, if it is a number or the absence of one."""
    value = reported.get(name, otherwise)
    return value if value is None or isinstance(value, (int, float)) else otherwise
