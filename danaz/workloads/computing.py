"""Where and how precisely a workload is computed: device, memory format, precision, and the loss of one batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from danaz.run.config import Config, ConfigError
from danaz.workloads.base import Workload


def choose_device(config: Config, gpu: torch.device | None = None) -> torch.device:
    """Where a config trains: on ``gpu`` (default: the current one) unless there is none or the config says cpu.

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
    """The model on its device, in the memory format asked for; on a GPU, with the matrix products asked for."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = config.precision == "tf32"  # torch's own default lets convolutions do it
        torch.backends.cudnn.benchmark = True  # all batches but the last of an epoch have one shape
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def batch_loss(model: nn.Module, workload: Workload, x: Any, y: Any, config: Config, device: torch.device) -> Tensor:
    """Mean loss over a batch, under autocast if the config says so."""
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    if config.channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    with precision(config, device):
        return workload.loss(model(x), y)


def precision(config: Config, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bf16" else nullcontext()
