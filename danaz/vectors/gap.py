"""The gap between the parameters and a worker's view, summed over layers (arXiv 1907.11612, section 3).

G(Δ) = Σ over layers ψ of ‖Δψ‖₂ / √(size of ψ). The squares of a layer add up over the slices that it lies in.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor

from danaz.vectors.cutting import chunks
from danaz.vectors.layout import Layout


class Layers:
    """The layers of a vector, without the empty ones."""

    def __init__(self, layout: Layout):
        self._entries = [entry for entry in layout.parameters if entry.size]
        self._starts = [entry.start for entry in self._entries]
        self._stops = [entry.stop for entry in self._entries]
        self._roots = torch.tensor([entry.size for entry in self._entries], dtype=torch.float64).sqrt()
        self._of_slice = [(self.within(*span), self._spans(*span)) for span in chunks(layout.size)]

    def __len__(self) -> int:
        return len(self._entries)

    def within(self, start: int, stop: int) -> range:
        """Return the numbers of the layers that lie in this slice or reach into it."""
        return range(bisect_right(self._stops, start), bisect_left(self._starts, stop))

    def _spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return where in the slice each of its layers lies."""
        entries = [self._entries[number] for number in self.within(start, stop)]
        return [(max(entry.start, start) - start, min(entry.stop, stop) - start) for entry in entries]

    def squares(self, slices: Iterable[Tensor]) -> Tensor:
        """Return ‖Δψ‖² of each layer, f64[layers]. Δ comes in slices, as cutting.chunks cuts it."""
        squares = torch.zeros(len(self), dtype=torch.float64)
        for piece, (numbers, spans) in zip(slices, self._of_slice, strict=True):
            norms = torch._foreach_norm([piece[start:stop] for start, stop in spans])
            squares[numbers.start : numbers.stop] += torch.stack(norms).double().square().cpu()
        return squares

    def gap(self, squares: Tensor) -> float | None:
        """Return G, computed from these squares f64[layers], or None if it is not finite."""
        gap = float((squares.sqrt() / self._roots).sum())
        return gap if isfinite(gap) else None
