"""The optimizers that what must hold is tested with: the optimizer axis of the tests.

SGD has one vector of state. AdamW has two, counts its gradients, and steps from the view; the others are for questions
in which NAdam's course, or a velocity beside a square, makes a difference.
"""

from __future__ import annotations

import pytest

from danaz.optimizers import SGD, Adagrad, Adam, NAdam, Optimizers, RMSprop

ADAMW = Optimizers([Adam(0.9, 0.99, weight_decay=0.1)])
AXIS = {
    "sgd": SGD,
    "adamw": ADAMW,
    "amsgrad": Optimizers([Adam(0.8, 0.9, amsgrad=True)]),
    "nadam": Optimizers([NAdam(0.9, 0.99, momentum_decay=0.1)]),
    "rmsprop": Optimizers([RMSprop(0.9, momentum=0.8)]),
    "adagrad": Optimizers([Adagrad()]),
}


def under(pairs: dict[str, str]) -> pytest.MarkDecorator:
    """Parametrize a test by ``algorithm`` and ``optimizers``; ``pairs`` says with which optimizers each goes."""
    return pytest.mark.parametrize(
        ("algorithm", "optimizers"),
        [
            pytest.param(algorithm, AXIS[name], id=f"{algorithm}-{name}")
            for algorithm, names in pairs.items()
            for name in names.split()
        ],
    )


def of(names: str = "sgd adamw") -> pytest.MarkDecorator:
    """Parametrize a test by ``optimizers``."""
    return pytest.mark.parametrize("optimizers", [AXIS[name] for name in names.split()], ids=names.split())
