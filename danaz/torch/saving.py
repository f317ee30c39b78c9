"""A script's own checkpoints: one file, which torch reads without danaz.

`torch.load(path, weights_only=True)` returns a dict: under `model` a state_dict, under `optimizer` that of torch's own
class, which a plain script goes on from, under `danaz` where the run was, and under `extra` what the script added. If a
script has several models or optimizers, there is a list of state_dicts, in the order in which they were wrapped.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danaz.files.atomic import replacing

PARTS = ("model", "optimizer", "danaz", "extra")
StateDict = dict[str, Any]
PLAIN = (type(None), bool, int, float, str)


class SavedFileError(ValueError):
    """A file is not one that danaz.save has written."""


@dataclass(frozen=True)
class Saved:
    """What danaz.load returns: where the run was that saved the file, and what its script added."""

    epoch: int  # the epoch of danaz.epochs that was under way, or just over
    progress: float  # epochs of the whole cluster, as danaz.progress() was
    version: int  # updates of the whole cluster
    seed: int | None  # which decided the order of the samples
    algorithm: str
    has_optimizer_state: bool  # whether the file holds momentum and the like
    extra: dict[str, Any]


def check_extra(value: Any, where: str = "extra") -> None:
    """Raise TypeError if ``value`` holds something that torch.load(…, weights_only=True) would not read."""
    if isinstance(value, dict):
        for key, each in value.items():
            check_extra(key, where)
            check_extra(each, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        for number, each in enumerate(value):
            check_extra(each, f"{where}[{number}]")
    elif not isinstance(value, Tensor) and type(value) not in PLAIN:
        raise TypeError(
            f"danaz.save was given {where}, a {type(value).__name__}, which torch.load(…, weights_only=True) would not "
            "read: give tensors, numbers, texts, and lists and dicts of them"
        )


def values_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the model's state_dict on the CPU."""
    state = model.state_dict()
    return {n: each.to("cpu", copy=True) if isinstance(each, Tensor) else each for n, each in state.items()}


def write(path: Path, models: Sequence[StateDict], optimizers: Sequence[StateDict], saved: Saved) -> None:
    """Write the file; until it is complete, what was there before stays. Raises OSError."""
    where = asdict(saved)
    parts = (_one_or_all(models), _one_or_all(optimizers), where, where.pop("extra"))
    with replacing(path) as part:
        torch.save(dict(zip(PARTS, parts, strict=True)), part)


def _one_or_all(each: Sequence[StateDict]) -> StateDict | list[StateDict]:
    return each[0] if len(each) == 1 else list(each)


def read(path: Path) -> tuple[list[StateDict], list[StateDict], Saved]:
    """Return the state_dict of each model and each optimizer, and the rest. Raises SavedFileError, and OSError."""
    if path.exists() and not zipfile.is_zipfile(path):
        raise SavedFileError(f"{path} was not written by danaz.save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model, optimizer, where, extra = (content[name] for name in PARTS)
        of_models, of_optimizers = (each if isinstance(each, list) else [each] for each in (model, optimizer))
        return of_models, of_optimizers, Saved(**where, extra=extra)
    except (RuntimeError, KeyError, TypeError, IndexError) as error:
        raise SavedFileError(
            f"{path} was not written by danaz.save. Read a file of torch's own by torch.load, and load what is in it "
            "by model.load_state_dict and optimizer.load_state_dict"
        ) from error
