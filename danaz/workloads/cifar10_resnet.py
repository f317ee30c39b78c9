"""Residual networks for CIFAR-10: He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from danaz.run.config import Config
from danaz.workloads.base import Workload, workload
from danaz.workloads.cifar10 import CLASSES, cifar10

WIDTHS = (16, 32, 64)


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015
    return convolution


class Block(nn.Module):
    """Two convolutions. If they add channels, the shortcut takes every other pixel, padded with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grow = outputs - inputs  # number of channels to add; if there are any, the image's size halves
        self.conv1 = _conv3x3(inputs, outputs, stride=2 if self.grow else 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow // 2)) if self.grow else x
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + shortcut
        return F.relu(out)


class ResNet(nn.Module):
    """A network of 6n + 2 layers for images of 3 x 32 x 32, in three stages of n blocks.

    n = 3 gives ResNet-20, which has 0.27 M parameters. Before the first layer, each square of ``shrink`` x ``shrink``
    pixels is averaged into one pixel.
    """

    def __init__(self, blocks_per_stage: int = 3, classes: int = CLASSES, shrink: int = 1) -> None:
        super().__init__()
        self.shrink = shrink
        self.conv = _conv3x3(3, WIDTHS[0])
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        inputs, blocks = WIDTHS[0], []
        for outputs in [width for width in WIDTHS for _ in range(blocks_per_stage)]:
            blocks.append(Block(inputs, outputs))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # f32[B, 3, H, W] -> f32[B, classes]
        if self.shrink > 1:
            x = F.avg_pool2d(x, self.shrink)
        out = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


@workload("cifar10-resnet20")
def build_resnet20(config: Config) -> Workload:
    train, test = cifar10(config)
    return Workload(ResNet(), train, test, F.cross_entropy, CLASSES)


@workload("cifar10-small")
def build_small(config: Config) -> Workload:
    """ResNet-8 on images averaged down to 16 x 16. Its updates are cheap enough to make as many as the papers do."""
    train, test = cifar10(config)
    return Workload(ResNet(blocks_per_stage=1, shrink=2), train, test, F.cross_entropy, CLASSES)
