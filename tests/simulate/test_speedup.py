"""The theoretical speed-up, compared with exact order statistics."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from danaz.cli.simulate import parse_numbers
from danaz.report.speedup import write_speedup
from danaz.simulate.speedup import speedup


def expected_slowest(workers: int) -> float:
    """Return E[max of n batch times] in units of their mean. It is the integral of 1 − F(t)ⁿ for F = Γ(100, 1/100)."""
    times = stats.gamma(100, scale=1 / 100)
    value, _ = integrate.quad(lambda t: 1 - times.cdf(t) ** workers, 0, 3, points=[1.0, 1.2])
    return float(value)


def test_synchronous_speedup_is_that_of_order_statistics() -> None:
    numbers = (1, 2, 4, 24, 64)
    found = speedup(numbers, heterogeneous=False, repetitions=4, iterations=5000)
    exact = [n / expected_slowest(n) for n in numbers]
    assert found.synchronous == pytest.approx(exact, rel=2e-3)
    assert found.asynchronous == pytest.approx(numbers)


def test_with_machines_that_differ_waiting_costs_more() -> None:
    numbers = (4, 32)
    alike = speedup(numbers, heterogeneous=False, repetitions=4, iterations=1000)
    different = speedup(numbers, heterogeneous=True, repetitions=4, iterations=1000)
    assert np.all(different.synchronous < 0.8 * alike.synchronous)


def test_the_size_of_chunks_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = speedup((3,), heterogeneous=False, repetitions=2, iterations=3000)
    monkeypatch.setattr("danaz.simulate.speedup.CHUNK", 700)
    cut = speedup((3,), heterogeneous=False, repetitions=2, iterations=3000)
    assert cut.synchronous == pytest.approx(whole.synchronous, rel=5e-3)


@pytest.mark.parametrize("workers", [(), (0,), (4, -1)])
def test_numbers_below_one_are_refused(workers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        speedup(workers, heterogeneous=False, repetitions=1, iterations=1)


def test_numbers_of_workers() -> None:
    assert parse_numbers("1,4,6-8") == [1, 4, 6, 7, 8]
    with pytest.raises(ValueError, match="expected numbers such as 1,4,8 or 1-64"):
        parse_numbers("four")


def test_files(tmp_path: Path) -> None:
    panels = [speedup((1, 2), heterogeneous=kind, repetitions=2, iterations=100) for kind in (False, True)]
    files = write_speedup(panels, tmp_path / "new")
    assert [file.name for file in files] == ["speedup.csv", "speedup.png", "speedup.svg"]
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    assert [(row["machines"], row["workers"]) for row in rows] == [
        ("homogeneous", "1"),
        ("homogeneous", "2"),
        ("heterogeneous", "1"),
        ("heterogeneous", "2"),
    ]
    assert float(rows[1]["synchronous"]) == pytest.approx(panels[0].synchronous[1], rel=1e-5)
    assert files[1].read_bytes().startswith(b"\x89PNG")
