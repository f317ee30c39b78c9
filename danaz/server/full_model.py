"""The full model of a run with several shards: what shard 0 knows of it, and which part each shard holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from danaz.protocol.messages import Bye, Join
from danaz.server.settings import ServerSettings
from danaz.vectors.cutting import all_finite, is_announced, shard_spans
from danaz.vectors.gap import Layers
from danaz.vectors.layout import Layout


class FullModel:
    """The layout of all parameters, and the other shards' part of θ, which a leaving worker brings."""

    def __init__(self, layout: Layout, rest: Tensor | None = None, version: int = -1):
        self.layout = layout
        self.layers = Layers(layout)
        self.rest = rest  # f32[P - slice of shard 0]
        self.version = version  # the version of shard 0 that ``rest`` belongs to

    def hear(self, bye: Bye) -> None:
        """Take over the rest of θ that a worker brings, if it is at least as new as the one at hand."""
        if bye.rest is not None and not is_announced(bye.rest) and all_finite(bye.rest) and bye.version >= self.version:
            self.rest, self.version = bye.rest, bye.version

    def params(self, own: Tensor) -> Tensor | None:
        """Return θ f32[P], which begins with ``own`` f32[n]; None if nobody has brought the rest."""
        missing = self.layout.size - own.numel()
        if not missing:
            return own
        if self.rest is None or self.rest.numel() != missing:
            return None
        return torch.cat([own, self.rest])

    def add_up(self, own: Tensor | None, others: Sequence[float]) -> Tensor | None:
        """Return the squares of all layers, f64[layers]: shard 0's plus the others'; None if either is missing."""
        if own is None or not others:
            return None
        squares = torch.tensor(others, dtype=torch.float64)
        squares[: own.numel()] += own
        return squares


def own_part(join: Join, settings: ServerSettings) -> Join:
    """Return ``join`` with the layout of this shard's part. Its parameters already are those of that part.

    If the model is too small for this number of shards, the layout is empty, and the server refuses the join.
    """
    if settings.shards == 1:
        return join
    try:
        start, stop = shard_spans(join.layout.size, settings.shards)[settings.shard]
    except ValueError:
        start, stop = 0, 0
    layout = join.layout.cut(start, stop)
    if settings.shard == 0:
        layout = replace(layout, buffers=join.layout.buffers)
    return replace(join, layout=layout)
