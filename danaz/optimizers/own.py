"""An optimizer that danaz does not know."""

from __future__ import annotations

from dataclasses import dataclass

from danaz.optimizers.base import Optimizer


@dataclass(frozen=True)
class Own(Optimizer):
    """The user's own class of optimizer, which makes its steps itself. Nothing is known of its state or momentum."""

    class_name: str = ""

    name = "own"

    def __post_init__(self) -> None:
        """A name has no range."""
