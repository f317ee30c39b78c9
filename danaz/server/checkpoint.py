"""The whole server core on disk: number.safetensors holds its vectors, number.json the rest and a checksum of both.

The JSON file appears last, and each file only when it is complete, so a kill at any moment leaves a checkpoint that is
whole or not there. What is torn or altered all the same is recognised by the checksum, and the one before is taken.

Of several shards each has a folder. Checkpoints of the same number, a generation, belong together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from danaz.server.state import CoreState, ResumeError

FOLDER = "checkpoints"  # within a run folder
FORMAT = "danaz checkpoint 2"
KEPT = 2
READ_BYTES = 1 << 20
SUFFIXES = (".json", ".safetensors", ".part")
Read = TypeVar("Read")


class DamagedError(ValueError):
    """A checkpoint that is torn or altered."""


def folders_of(run: Path, shards: int) -> list[Path]:
    """Where each of so many shards keeps its checkpoints."""
    return [run / (f"{FOLDER}.{shard}" if shard else FOLDER) for shard in range(shards)]


def newest_number(*folders: Path) -> int:
    """The largest number that a checkpoint has had, sound or not; 0 if there is none."""
    return max((number for folder in folders for number in _numbers(folder)), default=0)


def write_checkpoint(folder: Path, number: int, state: CoreState, folders: Sequence[Path] = ()) -> None:
    """Write a checkpoint; delete all but the last two, and the last two that all ``folders`` hold. Raises OSError."""
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
    own = _numbers(folder, ".json")
    common = own.intersection(*(_numbers(other, ".json") for other in folders))
    _delete(folder, upto=number, but={*sorted(own)[-KEPT:], *sorted(common)[-KEPT:]})


def read_newest(folder: Path) -> tuple[CoreState, list[str]] | None:
    """The newest sound checkpoint, and why newer ones were passed over; None if there never was one.

    Raises ResumeError if there are some, and all are damaged.
    """
    state, damaged = _newest_sound(_numbers(folder, ".json"), lambda number: _read(folder, number))
    if state is not None:
        return state, damaged
    if damaged:
        raise ResumeError(f"no checkpoint in {folder} is sound: {'; '.join(damaged)}")
    return None


def read_common(folders: Sequence[Path], shard: int) -> tuple[CoreState, list[str]] | None:
    """As read_newest, for one of several shards: of the newest generation that is sound in the ``folders`` of all.

    Each shard finds the same one, for a newer one is not common before all of them have gone on. Once shard 0 has kept
    that the training is done, nothing is to be trained again, and each goes on from its own newest.
    """
    if len(folders) == 1:
        return read_newest(folders[0])
    lead, _ = _newest_sound(_numbers(folders[0], ".json"), lambda number: _facts(folders[0], number))
    if lead is not None and CoreState(lead, {}).done:
        return read_newest(folders[shard])
    common = set.intersection(*(_numbers(folder, ".json") for folder in folders))
    state, damaged = _newest_sound(common, lambda number: _read_of_all(folders, shard, number))
    if state is not None and lead is not None:
        # What restarts have cost is not forgotten by going back to before them.
        state.facts["figures"] |= {name: lead["figures"][name] for name in ("restarts", "lost_updates")}
        return state, damaged
    if damaged or (lead is not None and CoreState(lead, {}).version):
        why = "; ".join(damaged) or "their numbers differ"
        raise ResumeError(f"no checkpoint is there, and sound, of all {len(folders)} shards: {why}")
    return None  # it ended before all had kept the beginning


def _newest_sound(numbers: Iterable[int], read: Callable[[int], Read]) -> tuple[Read | None, list[str]]:
    """The first that can be read from the newest on, and why those before it cannot."""
    damaged: list[str] = []
    for number in sorted(numbers, reverse=True):
        try:
            return read(number), damaged
        except DamagedError as error:
            damaged.append(f"checkpoint {number} is damaged: {error}")
    return None, damaged


def delete_checkpoints(*folders: Path) -> None:
    """Those of a run that is complete."""
    for folder in folders:
        _delete(folder, upto=newest_number(folder))
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _read_of_all(folders: Sequence[Path], shard: int, number: int) -> CoreState:
    """Raises DamagedError unless it is sound in all folders."""
    for folder in folders:
        try:
            _facts(folder, number)
        except DamagedError as error:
            raise DamagedError(f"in {folder.name} {error}") from error
    return _read(folders[shard], number)


def _read(folder: Path, number: int) -> CoreState:
    facts = _facts(folder, number)
    try:
        return CoreState(facts, load_file(_files(folder, number)[0]))
    except (OSError, SafetensorError) as error:
        raise DamagedError(str(error)) from error


def _facts(folder: Path, number: int) -> dict[str, Any]:
    """What is in a checkpoint beside its tensors. Raises DamagedError unless all of it is sound."""
    tensors, facts = _files(folder, number)
    try:
        content = json.loads(facts.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DamagedError(f"{facts.name} is not of this version of danaz")
        if _digest(content.get("facts"), tensors) != content.get("sha256"):
            raise DamagedError("its checksum is another")
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing") from error
    except ValueError as error:
        raise DamagedError(str(error)) from error
    read: dict[str, Any] = content["facts"]
    return read


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


def _delete(folder: Path, upto: int, but: Collection[int] = ()) -> None:
    for number in _numbers(folder):
        if number <= upto and number not in but:
            for suffix in SUFFIXES:
                (folder / f"{number:06d}").with_suffix(suffix).unlink(missing_ok=True)


def _numbers(folder: Path, *suffixes: str) -> set[int]:
    """Of all checkpoints of which there is a file, one that was never finished included."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(p.stem) for p in paths if p.suffix in (suffixes or SUFFIXES) and p.stem.isdigit()}


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.json"
