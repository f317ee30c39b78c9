"""A short soak test with one fault of each kind, from a seed. `make soak` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak
from faults import FAULTS
from namespaces import missing, namespaces
from watched import SLOTS


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_every_kind_of_fault_is_survived(tmp_path: Path) -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with namespaces(tmp_path / "network", list(SLOTS)) as network:
        survived = soak.soak(network, tmp_path, seed=0, faults=len(FAULTS), minutes=0)
    assert {fault.fault for fault in survived} == set(FAULTS)
