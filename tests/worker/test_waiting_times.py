"""A worker waits a little longer than it must between repetitions, so that workers do not all ask at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaz.worker.link import RETRY_FIRST_S, RETRY_LONGEST_S, Backoff

MOST = 1.5  # the longest wait, as a multiple of the wait without its random part


@pytest.mark.parametrize("seed", range(20))
def test_each_wait_is_up_to_half_as_long_again(seed: int) -> None:
    backoff = Backoff(RETRY_FIRST_S, RETRY_LONGEST_S, seed)
    waits = [backoff.wait_s() for _ in range(200)]
    assert RETRY_FIRST_S <= waits[0] <= MOST * RETRY_FIRST_S
    assert all(RETRY_LONGEST_S <= wait <= MOST * RETRY_LONGEST_S for wait in waits[3:])
    assert max(waits) > 1.4 * RETRY_LONGEST_S


@given(st.integers(0, 2**32))
def test_waits_double_up_to_the_longest_with_jitter_on_top(seed: int) -> None:
    backoff = Backoff(1.0, 6.0, seed)
    for base in (1.0, 2.0, 4.0, 6.0, 6.0):
        assert base <= backoff.wait_s() <= 1.5 * base


def test_two_workers_do_not_wait_alike() -> None:
    assert Backoff(1.0, 6.0, 1).wait_s() != Backoff(1.0, 6.0, 2).wait_s()
