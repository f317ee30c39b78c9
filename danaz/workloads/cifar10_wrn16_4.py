"""WRN-16-4 for CIFAR-10: Zagoruyko and Komodakis 2016, *Wide Residual Networks* (depth 16, width 4, no dropout)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from danaz.run.config import Config
from danaz.workloads.base import Workload, workload
from danaz.workloads.cifar10 import CLASSES, cifar10


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


class Block(nn.Module):
    """B(3, 3) in pre-activation order: norm, ReLU and convolution, twice. If the width changes, the shortcut is 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.shortcut = _conv(inputs, outputs, size=1, stride=stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + shortcut


class WideResNet(nn.Module):
    """A network of 6n + 4 layers for images of 3 x 32 x 32, in three stages of n blocks.

    It is ``width`` times as wide as ResNet. Depth 16 and width 4 give 2.7 M parameters.
    """

    def __init__(self, depth: int = 16, width: int = 4, num_classes: int = CLASSES) -> None:
        super().__init__()
        blocks_per_stage = (depth - 4) // 6
        self.conv = _conv(3, 16)
        inputs, blocks = 16, []
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range(blocks_per_stage):
                halves = stage > 0 and index == 0
                blocks.append(Block(inputs, outputs, stride=2 if halves else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # f32[B, 3, H, W] -> f32[B, classes]
        out = F.relu(self.bn(self.blocks(self.conv(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


@workload("cifar10-wrn16-4")
def build_wrn16_4(config: Config) -> Workload:
    train, test = cifar10(config)
    return Workload(WideResNet(), train, test, F.cross_entropy, CLASSES)
