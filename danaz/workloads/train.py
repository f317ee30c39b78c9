"""The training loop that configs run. It is a script like any user's, built from a config instead of code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import danaz.torch as danaz
from danaz.files.seeds import derive_seed
from danaz.run.config import Config, ConfigError
from danaz.run.rates import lr_at
from danaz.workloads import build, collate
from danaz.workloads.computing import batch_loss, choose_device, place
from danaz.workloads.evaluate import final_figures


def train(config: Config) -> None:
    """Train what ``config`` says. This process is the rank that it was launched as."""
    danaz.init(digest=config.digest())
    if config.threads:
        torch.set_num_threads(config.threads)
    workload, device = build(config), choose_device(config, danaz.device())
    model = place(workload.model, config, device)
    # Each rank augments its samples with its own random numbers.
    torch.manual_seed(derive_seed(config.seed, danaz.worker_id(), danaz.rank()))
    optimizer = danaz.DistributedOptimizer(make_optimizer(model, config), model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: lr_at(config, epoch) / config.lr)
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
        scheduler.step()
    if danaz.is_main():
        danaz.report(**final_figures(model, workload, config, device))


OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make the optimizer that a config describes, as a user would tune it on one worker.

    Raises ConfigError for options that torch's class does not take.
    """
    options = {"lr": config.lr, "weight_decay": config.weight_decay, **config.optimizer_options}
    try:
        optimizer: torch.optim.Optimizer = OPTIMIZERS[config.optimizer](model.parameters(), **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_options = {config.optimizer_options}: {config.optimizer}: {error}") from None
    for group in optimizer.param_groups if config.optimizer == "sgd" else ():
        # The momentum is set here, because torch's constructor refuses a negative one, which asynchrony may need.
        group.update(momentum=config.momentum, nesterov=True)
    return optimizer
