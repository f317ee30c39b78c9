"""torchvision's data sets, by name, with their training and test parts. danaz does not download them."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from danaz.run.config import ConfigError, suggest


def load(name: str, data_dir: str | None) -> tuple[Any, Any | None]:
    """Open ``torchvision.datasets.<name>`` in ``data_dir``; return its training part, and its test part or None.

    Raises:
        ConfigError: there is no such data set, or the folder does not hold it; the message says how to get it.
    """
    if name not in datasets.__all__:
        raise ConfigError(f"data: torchvision has no data set {name!r}{suggest(name, datasets.__all__)}")
    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    if "root" in parameters and not data_dir:
        raise ConfigError(f"data_dir is not set: give the folder that holds {name}, for example --set data_dir=data")
    root = [os.path.expanduser(data_dir)] if "root" in parameters and data_dir else []
    if kind is datasets.ImageFolder:
        return _open(kind, f"{root[0]}/train"), _open(kind, f"{root[0]}/val")
    if "train" in parameters:
        return _open(kind, *root, train=True), _open(kind, *root, train=False)
    if "split" in parameters:
        held_out = "val" if kind in (datasets.ImageNet, datasets.Imagenette) else "test"
        return _open(kind, *root, split="train"), _open(kind, *root, split=held_out)
    return _open(kind, *root), None


def _open(kind: Any, *root: str, **part: bool | str) -> Any:
    try:
        return kind(*root, **part)
    except (RuntimeError, OSError) as error:  # torchvision raises these for missing or damaged files
        call = ", ".join([*map(repr, root), *(f"{key}={value!r}" for key, value in part.items())])
        if "download" in inspect.signature(kind).parameters:
            advice = f'Download it with: python -c "from torchvision.datasets import {kind.__name__} as D; '
            advice += f'D({call}, download=True)"'
        else:
            advice = f"torchvision's documentation of {kind.__name__} says which files it expects"
        where = "".join(f" in {Path(folder).absolute()}" for folder in root)
        what = str(error).partition(". ")[0]  # the rest of the message says how to call torchvision itself
        raise ConfigError(f"data_dir: {kind.__name__} was looked for{where}: {what}. {advice}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"data: torchvision's {kind.__name__} has no plain training and test part ({error}). Write a function that "
            "returns both and name it: data: package.module:function"
        ) from error


def pixels(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Return all images u8[n, C, H, W] and labels i64[n] of a data set that holds them in memory, otherwise None."""
    images, labels = getattr(dataset, "data", None), getattr(dataset, "targets", getattr(dataset, "labels", None))
    if images is None or labels is None:
        return None
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim not in (3, 4):
        return None
    if images.ndim == 3:  # [n, H, W]
        images = images.unsqueeze(1)
    elif images.shape[1] not in (1, 3):  # [n, H, W, C]
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(labels).long()
