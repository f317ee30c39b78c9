"""The handwritten digits that come with scikit-learn (UCI's optdigits): 1797 images of 8x8. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danaz.run.config import Config
from danaz.workloads.base import Workload, workload
from danaz.workloads.images import Augmentation, ImageTensors

MEAN, STD, WHITE = 0.305, 0.376, 16  # mean and deviation of all pixels, as fractions of the brightest value, 16


class DigitsNet(nn.Sequential):
    """Three convolutions with batch norm, then a linear layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            *_convolution(1, 8, stride=1),
            *_convolution(8, 16, stride=2),
            *_convolution(16, 32, stride=2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, classes),
        )


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def split_by_class(labels: Tensor) -> Tensor:
    """Return bool[n], True for test samples: every fifth sample of each class, in data order, the same for any seed."""
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[(labels == label).nonzero().squeeze(1)[::5]] = True
    return test


@workload("digits")
def build_digits(config: Config) -> Workload:
    from sklearn.datasets import load_digits  # the import takes most of a second, and no other workload needs it

    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.uint8).unsqueeze(1)  # u8[1797, 1, 8, 8]
    labels = torch.from_numpy(raw.target).long()
    test = split_by_class(labels)
    augmentation = Augmentation(padding=1, flip=False) if config.augment else None
    return Workload(
        model=DigitsNet(),
        train=ImageTensors(images[~test], labels[~test], [MEAN], [STD], WHITE, augmentation),
        test=ImageTensors(images[test], labels[test], [MEAN], [STD], WHITE),
        loss=F.cross_entropy,
        classes=10,
    )


@workload("digits-mlp")
def build_digits_mlp(config: Config) -> Workload:
    """The same images for a perceptron with two hidden layers."""
    layers = (nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return replace(build_digits(config), model=nn.Sequential(*layers))
