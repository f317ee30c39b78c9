"""CIFAR-10 (Krizhevsky 2009) in memory, augmented as He et al. do: add 4 black pixels at each edge, crop, and flip."""

from __future__ import annotations

from danaz.run.config import Config
from danaz.workloads.images import Augmentation, ImageTensors
from danaz.workloads.torchvision_data import load, pixels

CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of each channel of the training images


def cifar10(config: Config) -> tuple[ImageTensors, ImageTensors]:
    """Load 50,000 training and 10,000 test images of 3 x 32 x 32, as ``torchvision.datasets.CIFAR10`` keeps them.

    Raises:
        ConfigError: the images are not in ``data_dir``.
    """
    augmentation = None if config.augment is False else Augmentation(padding=4, flip=True)
    train, test = [pixels(part) for part in load("CIFAR10", config.data_dir)]
    assert train, "torchvision holds CIFAR-10 in memory"
    assert test
    return ImageTensors(*train, MEAN, STD, augmentation=augmentation), ImageTensors(*test, MEAN, STD)
