"""The table of a run's workers: it shows at the end of a run which machine was slow, and why."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from danaz.cli.output import workers_table


def facts(samples_per_second: float, **others: Any) -> dict[str, Any]:
    spent = {"computing": 8.0, "exchanging": 1.0, "waiting": 0.5, "reading": 0.5}
    spent |= {name: others.pop(name) for name in list(others) if name in spent}
    times = {f"{name}_seconds": seconds for name, seconds in spent.items()}
    usual = {"host": "a", "ranks": 4, "median_lag": 2, "restarts": 0}
    return {**usual, "samples_per_second": samples_per_second, **times, **others}


def shown(per_worker: dict[str, dict[str, Any]], width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(workers_table(per_worker))
    return capture.get().splitlines()


def test_the_slowest_comes_first_and_is_named():
    slow = facts(100.0, host="b", computing=1.0, reading=9.0, exchanging=0.0, waiting=0.0, median_lag=15)
    heading, first, *others = shown({"0": facts(1000.0), "1": slow, "2": facts(1100.0)})
    assert heading.split() == ["worker", "host", "ranks", "samples/s", "lag", "compute", "exchange", "wait", "read"]
    assert first.split() == ["1", "b", "4", "100", "15", "10%", "0%", "0%", "90%", "slow:", "0.1×"]
    assert [line.split()[0] for line in others] == ["0", "2"]
    assert not any("slow" in line for line in others)


def test_equal_workers_are_not_called_slow():
    assert not any("slow" in line for line in shown({str(number): facts(100.0 + number) for number in range(3)}))


def test_a_worker_that_did_nothing_has_no_shares():
    idle = facts(0.0, computing=0.0, exchanging=0.0, waiting=0.0, reading=0.0)
    _, first, _ = shown({"0": facts(10.0), "1": idle})
    assert first.split()[3:9] == ["0", "2", "–", "–", "–", "–"]


def test_restarts_are_shown_if_there_were_any():
    heading, first, second = shown({"0": facts(10.0), "1": facts(20.0, restarts=2)})
    assert heading.split()[-1] == "restarts"
    assert (first.split()[-1], second.split()[-1]) == ("0", "2")


def test_of_many_workers_the_slowest_are_shown():
    lines = shown({str(number): facts(100.0 + number) for number in range(40)})
    assert len(lines) == 1 + 16 + 1
    assert "and 24 faster ones" in lines[-1]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_broken(width):
    long_name = facts(10.0, host="gpu-node-17.some-cluster.example.org", restarts=2)
    heading, first, _ = shown({"0": long_name, "1": facts(100.0)}, width)
    assert {"samples/s", "exchange", "restarts"} <= set(heading.split())
    assert "slow: " in first
