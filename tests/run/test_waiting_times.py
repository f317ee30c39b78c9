"""The docs say how long a worker waits between repetitions: up to half as much again is added to each wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from danaz.worker.core import Backoff
from danaz.worker.link import RETRY_FIRST_S, RETRY_LONGEST_S
from danaz.worker.sharded import ASK_LONGEST_S

DOCS = Path(__file__).parents[2] / "docs"
MOST = 1.5  # of a wait without the random part


def said(page: str) -> str:
    return " ".join((DOCS / page).read_text().split())


def test_requests_are_repeated_as_the_docs_say() -> None:
    first, longest = (f"{low:g} to {MOST * low:g} s" for low in (RETRY_FIRST_S, RETRY_LONGEST_S))
    assert f"when nothing came back for {first} (later {longest})" in said("performance.md")


def test_shards_are_asked_as_the_docs_say() -> None:
    assert f"at growing intervals, of {MOST * ASK_LONGEST_S:g} s at most" in said("when-things-fail.md")


@pytest.mark.parametrize("seed", range(20))
def test_each_wait_is_up_to_half_as_long_again(seed: int) -> None:
    backoff = Backoff(RETRY_FIRST_S, RETRY_LONGEST_S, seed)
    waits = [backoff.wait_s() for _ in range(200)]
    assert RETRY_FIRST_S <= waits[0] <= MOST * RETRY_FIRST_S
    assert all(RETRY_LONGEST_S <= wait <= MOST * RETRY_LONGEST_S for wait in waits[3:])
    assert max(waits) > 1.4 * RETRY_LONGEST_S
