"""A checkpoint on disk: number.safetensors holds the server's vectors, number.json the rest and a checksum of both.

The JSON file is written last, and a file gets its name only when it is complete, so a kill at any moment leaves either
a whole checkpoint or none. If a checkpoint is torn or altered all the same, its checksum shows this, and the server
takes the checkpoint before it.

With several shards, each shard has a folder of its own, perhaps on another machine. The checkpoints with the same
number form one generation: they belong together.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from danaz.files.atomic import replacing
from danaz.server.snapshot import ResumeError, Snapshot

FOLDER = "checkpoints"  # within a run folder
FORMAT = "danaz checkpoint 2"
RESTARTS = "restarts"  # a file in FOLDER: how often the server was restarted, and updates lost without a checkpoint
KEPT = 2  # how many checkpoints a run keeps
MANY = 8  # how many a shard keeps in addition to those that all shards have
READ_BYTES = 1 << 20
PART = ".part"  # of a file that is being written; a kill leaves it, and its number is not used again
SUFFIXES = (".json", ".safetensors", PART)
MODE = 0o644  # others may read a run


class DamagedError(Exception):
    """A checkpoint that is torn or altered."""

    def __init__(self, number: int, why: object):
        super().__init__(f"checkpoint {number} is damaged: {why}")


def folder_of(run: Path, shard: int = 0) -> Path:
    """Return the folder in which this shard keeps its checkpoints."""
    return run / (f"{FOLDER}.{shard}" if shard else FOLDER)


def complete_numbers(folder: Path) -> list[int]:
    """Return the numbers of the finished checkpoints, sound or not, in ascending order."""
    return sorted(_numbers(folder, ".json"))


def newest_number(folder: Path) -> int:
    """Return the largest number of any checkpoint, finished or not; 0 if there is none."""
    return max(_numbers(folder), default=0)


def worth_keeping(numbers: Sequence[int], common: Collection[int]) -> list[int]:
    """Return those of a shard's checkpoints (``numbers``, ascending) that it should keep.

    ``common`` are the newest checkpoints that all shards are known to have. The newest MANY after them are kept too,
    because nobody knows yet which of these all shards will have next.
    """
    since = [number for number in numbers if number > min(common, default=0)]
    return [number for number in numbers if number in {*common, *since[-MANY:]}]


def write_checkpoint(folder: Path, number: int, snapshot: Snapshot, keep: Collection[int] = ()) -> None:
    """Write a checkpoint, then delete all others except those in ``keep``.

    If this raises OSError, it leaves no part of the new checkpoint. The run folder must exist: if it was deleted, this
    does not create it again.
    """
    folder.mkdir(exist_ok=True)
    tensors, facts = _files(folder, number)
    try:
        with replacing(tensors, part=tensors.with_suffix(PART), mode=MODE) as part:
            _save(snapshot, part)
            digest = _digest(snapshot.facts, part)
        with replacing(facts, part=facts.with_suffix(PART), mode=MODE) as part:
            part.write_text(json.dumps({"format": FORMAT, "sha256": digest, "facts": snapshot.facts}))
    except OSError:
        _delete(folder, but={other for other in _numbers(folder) if other != number})
        raise
    _delete(folder, but={number, *keep})


def _save(snapshot: Snapshot, path: Path) -> None:
    """Save the vectors. Raises OSError where safetensors raises its own error, which has the cause only as text."""
    try:
        save_file(snapshot.tensors, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def read_newest(folder: Path) -> tuple[Snapshot, list[str]] | None:
    """Return the newest sound checkpoint, and why newer ones were skipped; None if none was ever finished.

    Raises ResumeError if there are checkpoints but all of them are damaged.
    """
    damaged: list[str] = []
    for number in reversed(complete_numbers(folder)):
        try:
            return read_checkpoint(folder, number), damaged
        except DamagedError as error:
            damaged.append(str(error))
    if damaged:
        raise ResumeError(f"no checkpoint in {folder} is sound: {'; '.join(damaged)}")
    return None


def read_checkpoint(folder: Path, number: int) -> Snapshot:
    """Read one checkpoint. Raises DamagedError unless all of it is sound."""
    facts = read_facts(folder, number)
    try:
        return Snapshot(facts, load_file(_files(folder, number)[0]))
    except (OSError, SafetensorError) as error:
        raise DamagedError(number, error) from error


def read_facts(folder: Path, number: int) -> dict[str, Any]:
    """Read what a checkpoint holds besides its tensors. Raises DamagedError unless all of it is sound."""
    tensors, facts = _files(folder, number)
    try:
        content = json.loads(facts.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DamagedError(number, f"{facts.name} is not of this version of danaz")
        if _digest(content.get("facts"), tensors) != content.get("sha256"):
            raise DamagedError(number, "its checksum is another")
    except FileNotFoundError as error:
        raise DamagedError(number, f"{error.filename} is missing") from error
    except (ValueError, RecursionError) as error:  # JSON that is nested too deeply raises RecursionError
        raise DamagedError(number, error) from error
    read: dict[str, Any] = content["facts"]
    return read


def delete_checkpoints(folder: Path, but: Collection[int] = ()) -> None:
    """Delete a complete run's checkpoints except those in ``but``, which are from before the run diverged."""
    _delete(folder, but)
    (folder / RESTARTS).unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def read_restarts(folder: Path) -> tuple[int, int]:
    """Return how often the server was restarted, and how many updates were lost without a checkpoint; 0 if unknown."""
    try:
        restarts, lost = map(int, (folder / RESTARTS).read_text().split())
    except (FileNotFoundError, ValueError):
        return 0, 0
    return restarts, lost


def write_restarts(folder: Path, restarts: int, lost: int) -> None:
    """Keep these figures in case the server is killed before it writes a checkpoint. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RESTARTS, part=folder / f"{RESTARTS}{PART}", mode=MODE) as part:
        part.write_text(f"{restarts} {lost}\n")


def _digest(facts: object, tensors: Path) -> str:
    """Return the SHA-256 of the facts and of every byte of the tensors' file."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with tensors.open("rb") as file:
        while content := file.read(READ_BYTES):
            digest.update(content)
    return digest.hexdigest()


def _delete(folder: Path, but: Collection[int] = ()) -> None:
    for number in _numbers(folder).difference(but):
        for suffix in SUFFIXES:
            (folder / f"{number:06d}").with_suffix(suffix).unlink(missing_ok=True)


def _numbers(folder: Path, *suffixes: str) -> set[int]:
    """Return the numbers of all checkpoints that have a file with one of ``suffixes`` (any suffix if none is given)."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(p.stem) for p in paths if p.suffix in (suffixes or SUFFIXES) and p.stem.isdigit()}


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.json"
