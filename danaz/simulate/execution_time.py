"""How long a mini-batch takes: the gamma model of machines (Ali et al., HCW 2000, "coefficient of variation based").

Times are in units in which the mean batch of size B takes B. Homogeneous machines vary from batch to batch alone; on
heterogeneous ones each machine has a mean of its own, drawn once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

V_BATCH = 0.1  # coefficient of variation from batch to batch
V_MACHINE = 0.6  # and from machine to machine

Times = np.ndarray[Any, np.dtype[np.floating[Any]]]


def gamma_times(rng: np.random.Generator, mean: float | Times, shape: tuple[int, ...]) -> Times:
    """Batch times Γ(1/V², mean·V²) of one kind of machine, f32[shape]; ``mean`` broadcasts against it."""
    scale = np.asarray(mean * V_BATCH**2, dtype=np.float32)
    times = rng.standard_gamma(1 / V_BATCH**2, shape, dtype=np.float32)
    return np.multiply(times, scale, out=times)


def machine_means(rng: np.random.Generator, mean: float, shape: tuple[int, ...]) -> Times:
    """Mean batch times Γ(1/Vm², mean·Vm²) of heterogeneous machines, f64[shape]."""
    return rng.gamma(1 / V_MACHINE**2, mean * V_MACHINE**2, shape)
