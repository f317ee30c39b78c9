"""How long a mini-batch takes on a machine: a gamma distribution.

The model is the "coefficient of variation based" method of Ali et al. (HCW 2000). A batch takes ``mean`` time units on
average. On machines of one kind, times vary only from batch to batch. Heterogeneous machines also differ in their mean
time, which is drawn once for each machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

V_BATCH = 0.1  # coefficient of variation from batch to batch
V_MACHINE = 0.6  # coefficient of variation from machine to machine

Times = np.ndarray[Any, np.dtype[np.floating[Any]]]


def gamma_times(rng: np.random.Generator, mean: float | Times, shape: tuple[int, ...]) -> Times:
    """Draw batch times Γ(1/V², mean·V²) with V = V_BATCH, f32[shape]; ``mean`` is broadcast to ``shape``."""
    scale = np.asarray(mean * V_BATCH**2, dtype=np.float32)
    times = rng.standard_gamma(1 / V_BATCH**2, shape, dtype=np.float32)
    return np.multiply(times, scale, out=times)


def machine_means(rng: np.random.Generator, mean: float, shape: tuple[int, ...]) -> Times:
    """Draw the mean batch times Γ(1/V², mean·V²) with V = V_MACHINE of heterogeneous machines, f64[shape]."""
    return rng.gamma(1 / V_MACHINE**2, mean * V_MACHINE**2, shape)
