"""The loop that configs run: a script like any user's, built from a config instead of code."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import danaz.torch as danaz
from danaz.run.config import Config, ConfigError
from danaz.workloads import Workload, build, collate

EVALUATION_BATCH = 500
TRAIN_LOSS_SAMPLES = 2048  # of the training set, for final_train_loss


def train(config: Config) -> None:
    """Train what ``config`` says, as the rank that this process was launched as."""
    danaz.init(digest=config.digest())
    if config.threads:
        torch.set_num_threads(config.threads)
    workload, device = build(config), choose_device(config, danaz.device())
    model = place(workload.model, config, device)
    torch.manual_seed(config.seed * 1000 + danaz.worker_id() * 100 + danaz.rank())  # for augmentation
    optimizer = danaz.DistributedOptimizer(make_sgd(model, config), model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: config.lr_at(epoch) / config.lr)
    loader = DataLoader(
        workload.train,
        batch_size=config.batch_size,
        shuffle=True,
        num_workers=config.num_workers,
        collate_fn=collate,
    )
    model.train()
    for epoch in danaz.epochs(config.epochs):
        for x, y in danaz.shard(loader, epoch):
            optimizer.zero_grad()
            loss = batch_loss(model, workload, x, y, config, device)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(loss=loss)
        with warnings.catch_warnings():
            # Other workers may be so fast that this one gets no batch in an epoch, and so no step before this one.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            scheduler.step()
    if danaz.is_main():
        danaz.report(**final_figures(model, workload, config, device))


def make_sgd(model: nn.Module, config: Config) -> torch.optim.SGD:
    """The optimizer that a config describes, as a user would tune it on one worker."""
    sgd = torch.optim.SGD(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    for group in sgd.param_groups:
        # Set here because torch's constructor refuses the negative momentum that asynchrony can ask for.
        group.update(momentum=config.momentum, nesterov=True)
    return sgd


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


@torch.no_grad()
def final_figures(
    model: nn.Module, workload: Workload, config: Config, device: torch.device
) -> dict[str, float | str | None]:
    """The figures of summary.json that only a model in hand can give: measured at θ."""
    model.eval()
    samples = len(workload.train)  # type: ignore[arg-type]
    train = Subset(workload.train, range(min(TRAIN_LOSS_SAMPLES, samples)))
    loss, _ = evaluate(model, workload, train, config, device)
    error = None
    if workload.test is not None and workload.classes is not None:
        _, correct = evaluate(model, workload, workload.test, config, device)
        error = 100 * (1 - correct)
    model.train()
    return {"final_train_loss": loss if isfinite(loss) else None, "test_error_percent": error}


@torch.no_grad()
def evaluate(
    model: nn.Module, workload: Workload, data: Dataset[Any], config: Config, device: torch.device
) -> tuple[float, float]:
    """Mean loss, and share of right answers (0 where there are no classes), over a data set."""
    samples = right = 0
    total = 0.0
    for x, y in DataLoader(data, batch_size=EVALUATION_BATCH, collate_fn=collate):
        x, y = x.to(device), y.to(device)
        with precision(config, device):
            output = model(x)
            total += workload.loss(output, y).item() * len(x)
        if workload.classes is not None:
            right += int((output.argmax(1) == y).sum())
        samples += len(x)
    return total / samples, right / samples
