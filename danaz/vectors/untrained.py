"""The rest of a model, which its optimizer does not train: frozen parameters, and buffers of any type.

Each process makes its model with random numbers of its own. The first view makes the trained parameters equal
everywhere. The rest is made equal once, before training: all ranks get it from worker 0's first rank.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

WORD_BYTES = 4  # the size of a float32, as which all of it travels


class Untrained:
    """The frozen parameters and buffers of a model, as one vector f32[U] of their raw bytes."""

    def __init__(self, model: nn.Module, trained: Collection[nn.Parameter]):
        known = {id(p) for p in trained}
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [t for t in tensors if id(t) not in known and t.numel()]
        self._words = [-(-t.numel() * t.element_size() // WORD_BYTES) for t in self._tensors]

    @property
    def size(self) -> int:
        """U, the number of float32 that the bytes fill."""
        return sum(self._words)

    @torch.no_grad()
    def packed(self) -> Tensor:
        """Return a copy of everything, f32[U] on the CPU. Its values mean nothing as numbers."""
        words = torch.zeros(self.size)
        for place, tensor in self._places(words):
            place.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        return words

    @torch.no_grad()
    def load(self, words: Tensor) -> None:
        """Set everything from what ``packed`` returned. Raises ValueError if the vector's size is not U."""
        if words.numel() != self.size:
            raise ValueError(
                f"the model's frozen parameters and buffers take {WORD_BYTES * self.size} bytes here and "
                f"{WORD_BYTES * words.numel()} on worker 0: all workers must make the same model"
            )
        for place, tensor in self._places(words):
            values = place.clone().view(tensor.dtype)
            tensor.copy_(values.reshape(tensor.shape))

    def _places(self, words: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor after the place in ``words`` f32[U] that holds its bytes."""
        places, start = [], 0
        for tensor, count in zip(self._tensors, self._words, strict=True):
            place = words[start : start + count].view(torch.uint8)
            places.append((place[: tensor.numel() * tensor.element_size()], tensor))
            start += count
        return places
