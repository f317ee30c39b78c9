"""The orders in which simulated workers push: their distributions, and the errors for those that do not fit."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from danaz.run.schedules import SCHEDULES
from danaz.simulate.execution_time import gamma_times, machine_means
from danaz.simulate.orders import ORDERS, OrderError, make_order


def turns(text: str, workers: int, count: int, seed: int = 0) -> list[int]:
    return list(islice(make_order(text, workers, seed), count))


def test_every_name_that_a_config_takes_has_an_order() -> None:
    assert set(ORDERS) == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
class TestEveryOrder:
    def test_seed_gives_the_order(self, name: str) -> None:
        assert turns(name, 5, 300, seed=3) == turns(name, 5, 300, seed=3)

    def test_every_worker_has_turns(self, name: str) -> None:
        assert set(turns(name, 256, 30_000)) == set(range(256))


def test_round_robin() -> None:
    assert turns("round-robin", 3, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_block_random_has_each_worker_once_a_block() -> None:
    order = turns("block-random", 4, 4000)
    blocks = [tuple(order[at : at + 4]) for at in range(0, 4000, 4)]
    assert all(sorted(block) == [0, 1, 2, 3] for block in blocks)
    assert len(set(blocks)) == 24  # all orders occur


def test_constant_speeds_give_shares() -> None:
    counts = Counter(turns("constant:1,2,5", 3, 8000))
    assert [round(counts[worker] / 1000) for worker in range(3)] == [1, 2, 5]


def test_gamma_machines_of_one_kind_keep_pace_with_each_other() -> None:
    counts = Counter(turns("gamma", 8, 8000))
    assert all(abs(counts[worker] - 1000) < 20 for worker in range(8))


def test_heterogeneous_machines_keep_their_own_pace() -> None:
    counts = Counter(turns("gamma-heterogeneous", 8, 8000))
    assert max(counts.values()) > 2 * min(counts.values())


def test_tail_probabilities_of_the_gamma_model() -> None:
    """P(t > 1.25 μ) is 0.94 % with machines of one kind and 27.9 % with machines that differ."""
    rng, draws = np.random.default_rng(0), 400_000
    alike = gamma_times(rng, 1.0, (draws,))
    different = gamma_times(rng, machine_means(rng, 1.0, (draws,)), (draws,))
    assert 100 * np.mean(alike > 1.25) == pytest.approx(0.94, abs=0.06)
    assert 100 * np.mean(different > 1.25) == pytest.approx(27.9, abs=0.3)


class TestTrace:
    def write(self, folder: Path, workers: list[int]) -> Path:
        file = folder / "updates.jsonl"
        file.write_text("".join(json.dumps({"version": n, "worker": w}) + "\n" for n, w in enumerate(workers, 1)))
        return file

    def test_is_followed_then_round_robin(self, tmp_path: Path) -> None:
        self.write(tmp_path, [2, 0, 0, 1])
        assert turns(f"trace:{tmp_path}", 3, 7) == [2, 0, 0, 1, 0, 1, 2]

    def test_of_more_workers_does_not_fit(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, [0, 3])
        with pytest.raises(OrderError, match=r"names worker 3 and does not fit a run of 3 workers, .* to 4"):
            make_order(f"trace:{file}", 3, 0)

    @pytest.mark.parametrize("content", ["", "{}\n", "no json\n", None])
    def test_unreadable(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "updates.jsonl").write_text(content)
        with pytest.raises(OrderError, match=r"trace|updates\.jsonl"):
            make_order(f"trace:{tmp_path}", 3, 0)


@pytest.mark.parametrize("speeds", ["1", "1,2,3", "1,0", "1,-2", "1,inf", "1,x", "nan,1"])
def test_speeds_that_do_not_fit_two_workers(speeds: str) -> None:
    with pytest.raises(OrderError, match="constant"):
        make_order(f"constant:{speeds}", 2, 0)
