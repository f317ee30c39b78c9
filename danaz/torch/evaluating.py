"""The model as it should be evaluated in mid-run, and afterwards the training state again, to the bit.

A model that trains is in training mode, and each rank has batch-norm statistics of its own. Ranks average them with
the last push of an epoch, which all of them make together. So any of them may evaluate after the loop over its batches,
alone or with others, without a word to the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from danaz.vectors.model import FlatModel
from danaz.worker.group import Group

AT = ("view", "server")


class EvaluationError(RuntimeError):
    """danaz cannot evaluate the model here, or not in this way."""


class TrainingState:
    """A model's trained parameters, buffers and modes, put aside while other values are in the model."""

    def __init__(self, model: nn.Module, flat: FlatModel):
        self._flat = flat
        self._modes = [(module, module.training) for module in model.modules()]
        flat.bring_home()
        self._params = flat.params.clone()
        self._buffers = [(buffer, buffer.clone()) for buffer in flat.model.buffers()]
        self.is_given_back = False

    def has_params_of(self, flat: FlatModel) -> bool:
        """Return whether the trained parameters are still in the vector of ``flat``."""
        return torch.equal(self._params, flat.params)

    @torch.no_grad()
    def give_back(self) -> None:
        """Put the values back into the model, and each module into its mode."""
        if self.is_given_back:
            return
        self.is_given_back = True
        self._flat.bring_home()
        self._flat.params.copy_(self._params)
        self._flat.show_params()
        for buffer, values in self._buffers:
            buffer.copy_(values)
        for module, is_training in self._modes:
            module.training = is_training


class MeanBuffers:
    """The mean of all ranks' floating-point buffers f32[B], as far as this rank knows it."""

    def __init__(self, group: Group):
        self._group = group
        self._own: Tensor | None = None  # f32[B], this rank's own, when the ranks were averaged
        self._mean: Tensor | None = None

    def average(self, flat: FlatModel) -> None:
        """Find the mean of the buffers as they are now. Every rank must call it."""
        if self._group.size > 1 and flat.layout.buffer_size:
            self._own, mean = flat.buffers(), flat.buffers()
            self._group.wait(self._group.sum_async(mean, "mean_buffers"))
            self._mean = mean.div_(self._group.size)

    def of(self, flat: FlatModel) -> Tensor:
        """Return the mean of all ranks' buffers, if they are as they were when they were averaged; else this rank's."""
        own = flat.buffers()
        if self._own is None or self._mean is None or not torch.equal(own, self._own):
            return own
        return self._mean


class Evaluations:
    """The evaluations that a script makes: those under way, one within the other, and how each begins and ends."""

    def __init__(self, group: Group):
        self.buffers = MeanBuffers(group)
        self._shows_servers = False  # whether the model holds the server's parameters, and not those that it trains on
        self._under_way: list[TrainingState] = []

    @contextmanager
    def evaluating(self, model: nn.Module, flat: FlatModel, params: Tensor | None, buffers: Tensor) -> Iterator[None]:
        """Evaluate ``model``, whose parameters are those of ``flat``, with ``params`` f32[P] and ``buffers`` f32[B].

        Without ``params``, the model keeps those that it has.
        """
        state, showed_servers = TrainingState(model, flat), self._shows_servers
        self._under_way.append(state)
        try:
            if params is not None:
                flat.params.copy_(params)
                flat.show_params()
                self._shows_servers = True
            flat.load_buffers(buffers)
            model.eval()
            with torch.no_grad():
                yield
        finally:
            state.give_back()
            self._shows_servers = showed_servers
            with suppress(ValueError):  # the run was ended within the evaluation
                self._under_way.remove(state)

    def shows_others(self, flat: FlatModel) -> bool:
        """Return whether an evaluation shows other parameters than those that the model trains on.

        They are the server's, or what the script has put there, such as averaged ones.
        """
        return self._shows_servers or any(not state.has_params_of(flat) for state in self._under_way)

    def check_none_under_way(self) -> None:
        """Raise EvaluationError if the script trains within an evaluation."""
        if self._under_way:
            raise EvaluationError(
                "optimizer.step() or danaz.shard was called within danaz.evaluating, which puts the training state "
                "back at its end: evaluate within it, and train outside of it"
            )

    def end(self) -> None:
        """Give back the training state now, because the run ends within the evaluation."""
        for state in reversed(self._under_way):
            state.give_back()
        self._under_way.clear()


def check_at(at: str) -> None:
    if at not in AT:
        raise ValueError(f"danaz.evaluating takes at={' or at='.join(map(repr, AT))}, not {at!r}")
