"""Images held in memory as bytes. It takes a few tensor operations to make a batch, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Augmentation:
    """Adds ``padding`` black pixels at each edge and crops at random; if ``flip``, mirrors each image with chance 1/2.

    The random numbers come from torch's global generator for the images' device.
    """

    padding: int
    flip: bool

    def __call__(self, images: Tensor) -> Tensor:  # u8[B, C, H, W] -> u8[B, C, H, W]
        batch, _, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2p + 1, 2p + 1, H, W], no copy
        down, right = torch.randint(2 * self.padding + 1, (2, batch), device=images.device)
        images = windows[torch.arange(batch, device=images.device), :, down, right]
        if self.flip:
            mirrored = torch.rand(batch, device=images.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images


class ImageTensors(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images, normalised when fetched: ``(pixel / white - mean) / std``, per channel.

    A DataLoader fetches a whole batch at once through ``__getitems__``; give it ``collate_fn=danaz.workloads.collate``.

    Args:
        images: u8[n, C, H, W].
        labels: i64[n].
        mean, std: one figure per channel, as fractions of ``white``. Three of them turn grey images into RGB.
        white: the value of the brightest pixel.
        augmentation: applied to each batch before it is normalised; None for test data.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        white: float = 255,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images = images  # u8[n, C, H, W]
        self.labels = labels  # i64[n]
        self.augmentation = augmentation
        deviation = torch.tensor(std).view(-1, 1, 1)  # f32[C, 1, 1]
        self._scale = 1 / (white * deviation)
        self._shift = -torch.tensor(mean).view(-1, 1, 1) / deviation

    def to(self, device: torch.device) -> ImageTensors:
        """Return the same images on ``device``, where they will also be augmented and normalised."""
        moved = copy(self)
        for name in ("images", "labels", "_scale", "_shift"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images f32[B, C, H, W] and labels i64[B]."""
        chosen = torch.as_tensor(indices, device=self.images.device)
        images = self.images[chosen]
        if self.augmentation is not None:
            images = self.augmentation(images)
        return images * self._scale + self._shift, self.labels[chosen]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image f32[C, H, W] and its label i64[]."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]
