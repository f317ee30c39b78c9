"""The whole server core on disk: number.safetensors holds its vectors, number.json the rest and a checksum of both.

The JSON file appears last, and each file only when it is complete, so a kill at any moment leaves a checkpoint that is
whole or not there. What is torn or altered all the same is recognised by the checksum, and the one before is taken.

Of several shards each has a folder, maybe on a machine of its own. Checkpoints of one number, a generation, belong
together.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from danaz.server.snapshot import CoreState, ResumeError

FOLDER = "checkpoints"  # within a run folder
FORMAT = "danaz checkpoint 2"
RESTARTS = "restarts"  # within that: how often the server was started again, and updates lost with no checkpoint
KEPT = 2
MANY = 8  # of one of several shards, beside those that are of all
READ_BYTES = 1 << 20
SUFFIXES = (".json", ".safetensors", ".part")


class DamagedError(Exception):
    """A checkpoint that is torn or altered."""

    def __init__(self, number: int, why: object):
        super().__init__(f"checkpoint {number} is damaged: {why}")


def folder_of(run: Path, shard: int = 0) -> Path:
    """Where this shard keeps its checkpoints."""
    return run / (f"{FOLDER}.{shard}" if shard else FOLDER)


def complete_numbers(folder: Path) -> list[int]:
    """Of the checkpoints that were finished, sound or not, ascending."""
    return sorted(_numbers(folder, ".json"))


def newest_number(folder: Path) -> int:
    """The largest that a checkpoint has had, finished or not; 0 if there is none."""
    return max(_numbers(folder), default=0)


def worth_keeping(numbers: Sequence[int], common: Collection[int]) -> list[int]:
    """Of a shard's checkpoints, ascending, those to keep when ``common`` are the newest known to be of all shards.

    Which of the later ones will be the next of all, is not known yet.
    """
    since = [number for number in numbers if number > min(common, default=0)]
    return [number for number in numbers if number in {*common, *since[-MANY:]}]


def write_checkpoint(folder: Path, number: int, state: CoreState, keep: Collection[int] = ()) -> None:
    """Write a checkpoint; then delete all others but those to ``keep``. Raises OSError, and leaves nothing of it then.

    The run folder must be there: one that was deleted is not made again for a checkpoint's sake.
    """
    folder.mkdir(exist_ok=True)
    tensors, facts = _files(folder, number)
    try:
        part = tensors.with_suffix(".part")
        _save(state, part)
        os.chmod(part, 0o644)  # others may read a run
        digest = _digest(state.facts, part)
        _publish(part, tensors)
        part = facts.with_suffix(".part")
        part.write_text(json.dumps({"format": FORMAT, "sha256": digest, "facts": state.facts}))
        _publish(part, facts)
    except OSError:
        _delete(folder, but={other for other in _numbers(folder) if other != number})
        raise
    _delete(folder, but={number, *keep})


def _save(state: CoreState, path: Path) -> None:
    """Raises OSError, which safetensors keeps to itself: only its words say what the system said."""
    try:
        save_file(state.tensors, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def read_newest(folder: Path) -> tuple[CoreState, list[str]] | None:
    """The newest sound checkpoint, and why newer ones were passed over; None if there never was one.

    Raises ResumeError if there are some, and all are damaged.
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


def read_checkpoint(folder: Path, number: int) -> CoreState:
    """Raises DamagedError unless all of it is sound."""
    facts = read_facts(folder, number)
    try:
        return CoreState(facts, load_file(_files(folder, number)[0]))
    except (OSError, SafetensorError) as error:
        raise DamagedError(number, error) from error


def read_facts(folder: Path, number: int) -> dict[str, Any]:
    """What is in a checkpoint beside its tensors. Raises DamagedError unless all of it is sound."""
    tensors, facts = _files(folder, number)
    try:
        content = json.loads(facts.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DamagedError(number, f"{facts.name} is not of this version of danaz")
        if _digest(content.get("facts"), tensors) != content.get("sha256"):
            raise DamagedError(number, "its checksum is another")
    except FileNotFoundError as error:
        raise DamagedError(number, f"{error.filename} is missing") from error
    except (ValueError, RecursionError) as error:  # which is what nesting without end comes to
        raise DamagedError(number, error) from error
    read: dict[str, Any] = content["facts"]
    return read


def delete_checkpoints(folder: Path, but: Collection[int] = ()) -> None:
    """Those of a run that is complete; of one that diverged, ``but`` those from before stay."""
    _delete(folder, but)
    (folder / RESTARTS).unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def read_restarts(folder: Path) -> tuple[int, int]:
    """How often the server was started again, and updates lost where there was no checkpoint, as far as was kept."""
    try:
        restarts, lost = map(int, (folder / RESTARTS).read_text().split())
    except (FileNotFoundError, ValueError):
        return 0, 0
    return restarts, lost


def write_restarts(folder: Path, restarts: int, lost: int) -> None:
    """Keep these figures for servers that are killed before they come to a checkpoint. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{RESTARTS}.part"
    part.write_text(f"{restarts} {lost}\n")
    _publish(part, folder / RESTARTS)


def _digest(facts: object, tensors: Path) -> str:
    """SHA-256 over the facts and over every byte of the tensors' file."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with tensors.open("rb") as file:
        while content := file.read(READ_BYTES):
            digest.update(content)
    return digest.hexdigest()


def _publish(part: Path, path: Path) -> None:
    """Give a complete file its name, and be sure that both outlive a crash of the machine."""
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(folder: Path, but: Collection[int] = ()) -> None:
    for number in _numbers(folder).difference(but):
        for suffix in SUFFIXES:
            (folder / f"{number:06d}").with_suffix(suffix).unlink(missing_ok=True)


def _numbers(folder: Path, *suffixes: str) -> set[int]:
    """Of all checkpoints of which there is a file, one that was never finished included."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(p.stem) for p in paths if p.suffix in (suffixes or SUFFIXES) and p.stem.isdigit()}


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.json"
