"""A convolutional network for images: SGD, a learning rate that rises and falls, shifted images, a test every epoch.

    python examples/train_cnn.py                                                          # alone
    danaz launch --hosts localhost:4 --workers-per-host 2 --algorithm dana -- python examples/train_cnn.py
    danaz launch --hosts localhost:4 --algorithm ssgd -- python examples/train_cnn.py     # synchronous

The images are the handwritten digits that come with scikit-learn, of 8 x 8 pixels.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import danaz.torch as danaz


class Digits(Dataset[tuple[Tensor, int]]):
    """Every fifth digit is for the test. The others are shifted by up to a pixel, differently each time."""

    def __init__(self, train: bool):
        digits = load_digits()
        chosen = [number for number in range(len(digits.target)) if (number % 5 != 0) == train]
        self.images = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 16  # f32[samples, 1, 8, 8]
        self.labels = digits.target[chosen].tolist()
        self.train = train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image = self.images[number]
        if self.train:
            down, right = torch.randint(3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[number]


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.dropout = nn.Dropout(0.2)
        self.linear1, self.linear2 = nn.Linear(32 * 2 * 2, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.linear1(x.flatten(1)))
        return self.linear2(self.dropout(x))


def train(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
) -> None:
    model.train()
    for x, y in danaz.shard(loader, epoch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(danaz.device())), y.to(danaz.device()), label_smoothing=0.1)
        loss.backward()
        optimizer.step(loss=loss)
        scheduler.step()


@torch.no_grad()
def test(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the mean loss, and the share of correct answers."""
    model.eval()
    loss, correct, samples = 0.0, 0, 0
    for x, y in loader:
        x, y = x.to(danaz.device()), y.to(danaz.device())
        output = model(x)
        loss += F.cross_entropy(output, y, reduction="sum").item()
        correct += int((output.argmax(1) == y).sum())
        samples += len(y)
    return loss / samples, correct / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05, help="the highest learning rate")
    parser.add_argument("--save", metavar="FILE", help="where to save the trained model")
    options = parser.parse_args()
    danaz.init()
    torch.set_num_threads(1)  # the net is tiny

    train_loader = DataLoader(Digits(train=True), batch_size=options.batch_size, shuffle=True)
    test_loader = DataLoader(Digits(train=False), batch_size=256)
    torch.manual_seed(0)
    model = Net().to(danaz.device())
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer = danaz.DistributedOptimizer(optimizer, model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, total_steps=options.epochs * len(train_loader), cycle_momentum=False
    )

    for epoch in danaz.epochs(options.epochs):
        train(model, train_loader, optimizer, scheduler, epoch)
        if danaz.is_main():
            with danaz.evaluating(model):
                loss, accuracy = test(model, test_loader)
            print(f"epoch {epoch + 1}: test loss {loss:.4f}, accuracy {accuracy:.2%}", flush=True)

    if danaz.is_main():
        loss, accuracy = test(model, test_loader)
        danaz.report(test_accuracy_percent=100 * accuracy)
        print(f"trained: test loss {loss:.4f}, accuracy {accuracy:.2%}", flush=True)
        if options.save:
            torch.save(model.state_dict(), options.save)


if __name__ == "__main__":
    main()
