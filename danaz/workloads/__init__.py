"""A workload is a model with its data. To add one, write a file like ``quadratic.py`` and import it here."""

from __future__ import annotations

import torch

from danaz.run.config import Config, ConfigError, suggest
from danaz.workloads import charlm, cifar10_resnet, cifar10_wrn16_4, digits, quadratic  # noqa: F401 - they register themselves
from danaz.workloads.base import BUILDERS, Workload, collate, workload
from danaz.workloads.by_name import build_by_name

__all__ = ["BUILDERS", "Workload", "build", "collate", "workload"]


def build(config: Config) -> Workload:
    """Build a config's workload. Torch is seeded from ``config.seed``, so every process has the same first parameters.

    Afterwards, each rank that augments its data should seed torch differently. Otherwise all ranks crop and flip alike.

    Raises:
        ConfigError: the workload, data set or model is unknown, or the data is not where ``data_dir`` says.
    """
    torch.manual_seed(config.seed)
    if config.workload is None:
        return build_by_name(config)
    if config.workload not in BUILDERS:
        hint = suggest(config.workload, BUILDERS) or "."
        raise ConfigError(f"workload = {config.workload!r} is unknown{hint} Known: {', '.join(sorted(BUILDERS))}")
    return BUILDERS[config.workload](config)
