"""How good a trained model is: its loss and its share of right answers over a data set."""

from __future__ import annotations

from math import isfinite, log
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from danaz.run.config import Config
from danaz.workloads.base import Workload, collate
from danaz.workloads.computing import precision

EVALUATION_BATCH = 500  # samples
TRAIN_LOSS_SAMPLES = 2048  # number of training samples that final_train_loss uses


@torch.no_grad()
def final_figures(
    model: nn.Module, workload: Workload, config: Config, device: torch.device
) -> dict[str, float | str | None]:
    """Return the figures of summary.json that need the trained model, which holds θ."""
    model.eval()
    samples = len(workload.train)  # type: ignore[arg-type]
    train = Subset(workload.train, range(min(TRAIN_LOSS_SAMPLES, samples)))
    loss, _ = evaluate(model, workload, train, config, device)
    figures: dict[str, float | str | None] = {"final_train_loss": _finite(loss), "test_error_percent": None}
    if workload.test is not None:
        loss, correct = evaluate(model, workload, workload.test, config, device)
        figures["test_loss"] = _finite(loss)
        if workload.classes is not None:
            figures["test_error_percent"] = 100 * (1 - correct)
        if workload.bits_per is not None:
            figures[f"test_bits_per_{workload.bits_per}"] = _finite(loss / log(2))
    model.train()
    return {**figures, **workload.facts}


def _finite(figure: float) -> float | None:
    return figure if isfinite(figure) else None


@torch.no_grad()
def evaluate(
    model: nn.Module, workload: Workload, data: Dataset[Any], config: Config, device: torch.device
) -> tuple[float, float]:
    """Return the mean loss and the share of right answers (0 if there are no classes) over a data set."""
    samples = right = targets = 0
    total = 0.0
    for x, y in DataLoader(data, batch_size=EVALUATION_BATCH, collate_fn=collate):
        x, y = x.to(device), y.to(device)
        with precision(config, device):
            output = model(x)
            total += workload.loss(output, y).item() * len(x)
        if workload.classes is not None:
            right += int((output.argmax(1) == y).sum())
            targets += y.numel()  # a sample may have several, as a text has one for each character
        samples += len(x)
    return total / samples, right / max(1, targets)
