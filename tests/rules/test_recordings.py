"""With SGD, every algorithm sends what it sent before it could carry out other optimizers: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from recordings import FILE, MOMENTA, record

RECORDED = np.load(FILE)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("name", sorted({key.split()[0] for key in RECORDED.files}))
def test_sgd_is_what_it_was(name, momentum):
    assert record(name, momentum).tobytes() == RECORDED[f"{name} {momentum}"].tobytes()
