"""The whole server core on disk: number.safetensors holds its vectors, number.json the rest and a checksum of both.

The JSON file appears last, and each file only when it is complete, so a kill at any moment leaves a checkpoint that is
whole or not there. What is torn or altered all the same is recognised by the checksum, and the one before is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from danaz.server.state import CoreState, ResumeError

FOLDER = "checkpoints"  # within a run folder
FORMAT = "danaz checkpoint 1"
KEPT = 2
READ_BYTES = 1 << 20
SUFFIXES = (".json", ".safetensors", ".part")


class DamagedError(ValueError):
    """A checkpoint that is torn or altered."""


def newest_number(folder: Path) -> int:
    """The largest number that a checkpoint has had, sound or not; 0 if there is none."""
    return max(_numbers(folder), default=0)


def write_checkpoint(folder: Path, number: int, state: CoreState) -> None:
    """Write a checkpoint and delete all but the last two. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, facts = _files(folder, number)
    part = tensors.with_suffix(".part")
    save_file(state.tensors, part)
    os.chmod(part, 0o644)  # others may read a run
    digest = _digest(state.facts, part)
    _publish(part, tensors)
    part = facts.with_suffix(".part")
    part.write_text(json.dumps({"format": FORMAT, "sha256": digest, "facts": state.facts}))
    _publish(part, facts)
    _delete(folder, upto=number - KEPT)


def read_newest(folder: Path) -> tuple[CoreState, list[str]] | None:
    """The newest sound checkpoint, and why newer ones were passed over; None if there never was one.

    Raises ResumeError if there are some, and all are damaged.
    """
    damaged: list[str] = []
    for number in sorted(_numbers(folder, ".json"), reverse=True):
        try:
            return _read(folder, number), damaged
        except DamagedError as error:
            damaged.append(f"checkpoint {number} is damaged: {error}")
    if damaged:
        raise ResumeError(f"no checkpoint in {folder} is sound: {'; '.join(damaged)}")
    return None


def delete_checkpoints(folder: Path) -> None:
    """Those of a run that is complete."""
    _delete(folder, upto=newest_number(folder))
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _read(folder: Path, number: int) -> CoreState:
    tensors, facts = _files(folder, number)
    try:
        content = json.loads(facts.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DamagedError(f"{facts.name} is not of this version of danaz")
        if _digest(content.get("facts"), tensors) != content.get("sha256"):
            raise DamagedError("its checksum is another")
        return CoreState(content["facts"], load_file(tensors))
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing") from error
    except (ValueError, SafetensorError) as error:
        raise DamagedError(str(error)) from error


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


def _delete(folder: Path, upto: int) -> None:
    for number in _numbers(folder):
        if number <= upto:
            for suffix in SUFFIXES:
                (folder / f"{number:06d}").with_suffix(suffix).unlink(missing_ok=True)


def _numbers(folder: Path, *suffixes: str) -> set[int]:
    """Of all checkpoints of which there is a file, one that was never finished included."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(p.stem) for p in paths if p.suffix in (suffixes or SUFFIXES) and p.stem.isdigit()}


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.json"
