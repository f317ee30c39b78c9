"""Reads and writes RUN/launch.yaml, which says how a run was launched. `danaz launch --resume RUN` needs it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from danaz.files.atomic import write_atomically
from danaz.files.plain_yaml import dump_yaml
from danaz.files.reading import UnreadableError, read_yaml
from danaz.launch.options import fixed_names
from danaz.options.option import newer_names
from danaz.run.config import Config, load_config
from danaz.run.folder import read_summary
from danaz.run.settings import Settings
from danaz.serving.checkpoint import folder_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kept = TypeVar("Kept", bound="DataclassInstance")

OPTIONS = "launch.yaml"
WHERE = {"hosts", "hostfile", "include", "exclude"}  # they say together which machines take part


class ResumeError(ValueError):
    """A run cannot go on; the message says why."""


def write_options(run: Path, options: Mapping[str, Any]) -> None:
    """Write how a run was launched."""
    write_atomically(run / OPTIONS, dump_yaml(dict(options)).encode())


def check_begun(run: Path) -> None:
    """Raise ResumeError unless a run was launched in this folder."""
    if not (run / OPTIONS).exists() or not (run / "config.yaml").exists():
        raise ResumeError(f"--resume {run}: there is no run of `danaz launch` (no {OPTIONS} and config.yaml)")


def read_options(run: Path) -> dict[str, Any]:
    """Read how a run was launched. Raises ResumeError if it cannot go on, and UnreadableError."""
    check_begun(run)
    if (run / "summary.json").exists() and read_summary(run).get("complete"):
        raise ResumeError(f"--resume {run}: this run is complete; its figures are in {run / 'summary.json'}")
    return read_yaml(run / OPTIONS)


def merge_options(run: Path, given: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    """Return ``given`` options where the command line ``named`` them, else those the run was launched with.

    Raises ResumeError.
    """
    refused = [words for name, words in fixed_names().items() if name in named]
    if refused:
        raise ResumeError(f"--resume goes on with what the run began; leave out {', '.join(refused)}")
    kept = read_options(run)
    shards, asked = kept.get("server_shards", 1), given.get("server_shards")
    if "server_shards" in named and asked != shards:
        raise ResumeError(
            f"--server-shards {asked}: the checkpoints of {run} hold {shards} slices, which cannot be cut again; "
            "leave it out"
        )
    if WHERE & set(named):
        kept = {name: value for name, value in kept.items() if name not in WHERE}
    return {**given, **kept, **{name: given[name] for name in named}}


def check_variables(kept: Sequence[str], found: Collection[str]) -> None:
    """Raise ResumeError for a missing variable. The values of `-x` are not kept, because they may be secrets."""
    missing = [name for name in kept if name not in found]
    if missing:
        again = " ".join(f"-x {name}" for name in missing)
        raise ResumeError(f"the run was launched with variables whose values are not kept; give them again: {again}")


def check_checkpoints(run: Path, earlier: str | None, now: str | None, elsewhere: Collection[int]) -> None:
    """Check that the server would find its checkpoints; otherwise raise ResumeError.

    They are on the machine where the server was killed, or on this one if the server ended in good order.

    ``earlier`` and ``now`` are the machines of the server as they were named; ``elsewhere``: its shards, shard 0 for
    the server itself, that now do not run here.
    """
    if any(folder_of(run, shard).is_dir() for shard in elsewhere):
        raise ResumeError(
            f"the checkpoints of {run} are on this machine; let its server run here: --server-host localhost"
        )
    are_here = not elsewhere and folder_of(run).is_dir()
    if (earlier or "localhost") != (now or "localhost") and not are_here:
        raise ResumeError(
            f"the server of {run} ran on {earlier or 'this machine'}, and its checkpoints are there; leave it there: "
            f"--server-host {earlier or 'localhost'}"
        )


def read_settings(run: Path) -> tuple[Config, None] | tuple[Settings, list[str]]:
    """Read the config of a run, or the settings and the command if it runs a script.

    Raises ResumeError, ConfigError, UnreadableError.
    """
    values = read_yaml(run / "config.yaml")
    if "command" not in values:
        check_all_there(run / "config.yaml", values, sorted(Config.model_fields.keys() - newer_names(Config)))
        return load_config(run / "config.yaml"), None
    path, command = run / "config.yaml", values.pop("command")
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise UnreadableError(path, "command should be the words of a command")
    check_all_there(path, values, sorted({field.name for field in fields(Settings)} - newer_names(Settings)))
    return checked(path, Settings, values), command


def check_all_there(path: Path, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise UnreadableError if a file was cut or edited: a missing value would silently become a default."""
    missing = [name for name in names if name not in values]
    if missing:
        raise UnreadableError(path, f"it is incomplete, or of another version of danaz: it lacks {', '.join(missing)}")


def checked(path: Path, kind: type[Kept], values: Mapping[str, Any]) -> Kept:
    """Return a dataclass of ``kind`` with the values that a file holds. Raises UnreadableError if they do not fit."""
    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise UnreadableError(path, f"this version of danaz does not know {', '.join(sorted(unknown))}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UnreadableError(path, f"{key} = {first['input']!r}: {first['msg']}") from None
