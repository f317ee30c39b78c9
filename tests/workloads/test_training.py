"""The loop that configs run: those parts of it that the tests of the public API do not cover."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from danaz.run.config import load_config
from danaz.simulate.simulator import simulate
from danaz.workloads import build
from danaz.workloads.computing import batch_loss, place

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_convolutions(precision: str, dtype: torch.dtype) -> None:
    config = load_config(DIGITS, [f"precision={precision}"])
    workload = build(config)
    seen: list[torch.dtype] = []
    for module in workload.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    images, labels = workload.train[0]
    loss = batch_loss(workload.model, workload, images[None].repeat(4, 1, 1, 1), labels.repeat(4), config, CPU)
    loss.backward()
    assert set(seen) == {dtype}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in workload.model.parameters() if p.grad is not None)


def test_bf16_learns(tmp_path: Path) -> None:
    changes = ["precision=bf16", "epochs=3", "workers=2", "lr_schedule.milestones=[2]"]
    assert simulate(load_config(DIGITS, changes), tmp_path)["test_error_percent"] < 10


def test_channels_last_is_kept_by_the_convolutions() -> None:
    config = load_config(DIGITS, ["channels_last=true"])
    model = place(build(config).model, config, CPU)
    kernels = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
