"""Random numbers that the run's seed decides, in the midst of a script that draws random numbers of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

Source = Any  # whatever gives random numbers and has a state: see _KINDS


def _seed_torch(source: Source, seed: int) -> None:
    source.manual_seed(seed)


def _seed_numpy(source: Source, seed: int) -> None:
    source.seed([seed >> 32, seed & 0xFFFFFFFF])  # it takes words of 32 bits


def _seed_numpy_generator(source: Source, seed: int) -> None:
    source.bit_generator.state = type(source.bit_generator)(seed).state


def _set_numpy_generator(source: Source, state: Any) -> None:
    source.bit_generator.state = state


# Each kind of source: how to seed it, to read its state, and to set its state.
_KINDS: dict[Any, tuple[Any, Any, Any]] = {
    torch.Generator: (_seed_torch, lambda source: source.get_state(), lambda source, state: source.set_state(state)),
    np.random.Generator: (_seed_numpy_generator, lambda source: source.bit_generator.state, _set_numpy_generator),
    np.random.RandomState: (_seed_numpy, lambda source: source.get_state(), lambda source, s: source.set_state(s)),
    random.Random: (lambda source, seed: source.seed(seed), lambda s: s.getstate(), lambda s, state: s.setstate(state)),
}
# The sources that a script uses without naming one. The modules have the methods of the classes.
_GLOBAL = ((torch.Generator, torch.default_generator), (np.random.RandomState, np.random), (random.Random, random))


def is_source(value: object) -> bool:
    """Return whether ``value`` is a generator of random numbers that RandomNumbers can seed."""
    return isinstance(value, tuple(_KINDS))


class RandomNumbers:
    """Random numbers that follow from ``seed``, within ``with``, for torch (on the CPU), numpy and random alike.

    The process's own ones are put back at the end of ``with``, and its next ``with`` goes on where this one was.
    ``others`` are further sources, such as a sampler's own generator.
    """

    def __init__(self, seed: int, others: Sequence[Source] = ()):
        kinds = [(next(kind for kind in _KINDS if isinstance(other, kind)), other) for other in others]
        self._sources = [(*_KINDS[kind], source) for kind, source in (*_GLOBAL, *kinds)]
        self._seed = seed
        self._states: list[Any] = []  # of these random numbers while others are in use; empty before the first use
        self._kept: list[Any] = []  # of the process's own while these are in use

    def __enter__(self) -> None:
        self._kept = [read(source) for _, read, _, source in self._sources]
        if self._states:
            self._put(self._states)
        else:
            for seed, _, _, source in self._sources:
                seed(source, self._seed)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._states = [read(source) for _, read, _, source in self._sources]
        self._put(self._kept)

    def _put(self, states: list[Any]) -> None:
        for (_, _, write, source), state in zip(self._sources, states, strict=True):
            write(source, state)
