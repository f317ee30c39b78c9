"""How a workload is computed: its device, memory format and precision, and the loss of one batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from danaz.run.config import Config, ConfigError
from danaz.workloads.base import Workload


def choose_device(config: Config, gpu: torch.device | None = None) -> torch.device:
    """Return the device for a config: ``gpu`` (default: the current GPU), or the CPU if the config or torch says so.

    Raises:
        ConfigError: the config wants a GPU that torch does not see.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device = cuda, but torch sees no GPU here: check nvidia-smi and torch.version.cuda, or use device=cpu"
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return gpu or torch.device("cuda")


def place(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Put the model on its device, in the config's memory format; on a GPU, set the precision of matrix products."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = config.precision == "tf32"  # by default, torch lets convolutions use TF32
        torch.backends.cudnn.benchmark = True  # all batches have the same shape, except the last of an epoch
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def batch_loss(model: nn.Module, workload: Workload, x: Any, y: Any, config: Config, device: torch.device) -> Tensor:
    """Return the mean loss over a batch, under autocast if the config says so."""
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    if config.channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    with precision(config, device):
        return workload.loss(model(x), y)


def precision(config: Config, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the config's precision holds."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bf16" else nullcontext()
