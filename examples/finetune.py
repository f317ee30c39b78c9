"""Fine-tuning: a new head on a pretrained network whose layers are frozen at first, and then train more slowly.

    python examples/finetune.py                                                          # alone
    danaz launch --hosts localhost:4 --workers-per-host 2 --algorithm dana -- python examples/finetune.py
    danaz launch --hosts localhost:4 --algorithm ssgd -- python examples/finetune.py     # synchronous

The network has learned the digits 0 to 4. From a few images of each, it learns 5 to 9.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import danaz.torch as danaz

EXAMPLES = 30  # images of each new digit to learn from


def load(digits: range) -> TensorDataset:
    """Return the images of these digits, f32[samples, 1, 8, 8], and their numbers from 0, i64[samples]."""
    everything = load_digits()
    chosen = (everything.target >= digits.start) & (everything.target < digits.stop)
    images = torch.from_numpy(everything.images[chosen]).float().unsqueeze(1) / 16
    return TensorDataset(images, torch.from_numpy(everything.target[chosen]).long() - digits.start)


def make_backbone() -> nn.Sequential:
    """Make the layers that turn an image into 128 features."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
    )


def pretrained_backbone() -> nn.Sequential:
    """Return a backbone that knows 0 to 4. This takes a second; for a large one, you would load a file instead."""
    torch.manual_seed(0)
    backbone = make_backbone()
    model = nn.Sequential(backbone, nn.Linear(128, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for x, y in DataLoader(load(range(5)), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return backbone


def split(data: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """Return the first few images of each digit, and all the others."""
    images, labels = data.tensors
    first = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        first[(labels == label).nonzero()[:EXAMPLES]] = True
    return TensorDataset(images[first], labels[first]), TensorDataset(images[~first], labels[~first])


@torch.no_grad()
def accuracy_of(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    x, y = (tensor.to(danaz.device()) for tensor in data.tensors)
    return (model(x).argmax(1) == y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--frozen-epochs", type=int, default=6, help="epochs in which the head trains alone")
    parser.add_argument("--lr", type=float, default=1e-2, help="of the head; the backbone's is a tenth")
    options = parser.parse_args()
    danaz.init()
    torch.set_num_threads(1)  # the net is tiny

    train, test = split(load(range(5, 10)))
    loader = DataLoader(train, batch_size=16, shuffle=True)
    backbone, head = pretrained_backbone(), nn.Linear(128, 5)
    model = nn.Sequential(backbone, head).to(danaz.device())
    groups = [{"params": head.parameters()}, {"params": backbone.parameters(), "lr": options.lr / 10}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    optimizer = danaz.DistributedOptimizer(optimizer, model)

    for epoch in danaz.epochs(options.epochs):
        frozen = epoch < options.frozen_epochs
        backbone.requires_grad_(not frozen)
        model.train()
        backbone.train(not frozen)  # a frozen batch norm keeps its statistics, too
        for x, y in danaz.shard(loader, epoch):
            optimizer.zero_grad()
            loss = cross_entropy(model(x.to(danaz.device())), y.to(danaz.device()))
            loss.backward()
            optimizer.step(loss=loss)
        if danaz.is_main():
            training = sum(p.numel() for p in model.parameters() if p.requires_grad)
            with danaz.evaluating(model):
                accuracy = accuracy_of(model, test)
            print(f"epoch {epoch + 1}: {training} parameters train, test accuracy {accuracy:.2%}", flush=True)

    if danaz.is_main():
        accuracy = accuracy_of(model, test)
        danaz.report(test_accuracy_percent=100 * accuracy)
        print(f"trained: test accuracy {accuracy:.2%}", flush=True)


if __name__ == "__main__":
    main()
