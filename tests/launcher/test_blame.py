"""When the end of one rank makes its neighbours fail, that rank is blamed, in whatever order the reports arrive."""

from __future__ import annotations

import signal
import types
from itertools import combinations, permutations
from pathlib import Path

import pytest

from launcher import logs as logs_module
from launcher.agents import Exit
from launcher.failure import USAGE, Failure
from launcher.hosts import parse_hosts
from launcher.life import LONGEST_SETTLE_S, SETTLE_S, Life, RunContext, Timeouts
from launcher.logs import Logs, quiet
from launcher.plan import Workers, plan
from launcher.transport import local_agent_command

TRACEBACK = b"Traceback (most recent call last)\nRuntimeError: Connection closed by peer\n"
PULLED_ALONG = ("raises 0", "exits 0", "raises 1", "exits 1", "aborts 2")
ORDERS = [order for order in permutations(PULLED_ALONG) if order.index("raises 0") < order.index("exits 0")]
ORDERS = [order for order in ORDERS if order.index("raises 1") < order.index("exits 1")]


class Unit:
    """One world of four ranks. The test says which reports arrive, and when."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs_module, "time", types.SimpleNamespace(monotonic=lambda: self.now_s))
        self.now_s = 100.0
        laid = plan(parse_hosts("localhost:4"), Workers(["train"], one_world=True), env={}, cwd="/")
        logs = Logs(folder, quiet)
        around = RunContext(laid, logs, local_agent_command, Timeouts(grace_s=0.0))
        self.life = Life(laid.units[0], around, 1)
        self.ranks = {str(process.rank): process for process in laid.ranks}
        for process in laid.ranks:
            logs.open(process)

    def hear(self, event: str) -> None:
        what, rank = event.split()
        if what == "raises":
            self.life.around.logs.write(self.ranks[rank], "stderr", TRACEBACK)
        else:
            self.exit(rank, {"exits": 1, "aborts": -signal.SIGABRT, "leaves": USAGE, "killed": -signal.SIGKILL}[what])

    def exit(self, rank: str, status: int, missing: str | None = None, said_that_it_leaves: bool = False) -> None:
        end = Exit(status, None, self.now_s, missing, said_that_it_leaves=said_that_it_leaves)
        self.life.agents.exits[self.ranks[rank].name] = end

    def judge(self) -> Failure | None:
        return self.life.judge(self.now_s)

    def blame(self, events: tuple[str, ...], apart_s: float) -> Failure:
        """Return the first verdict. Look after each event, and then as often as the life asks."""
        for event in events:
            self.hear(event)
            failure = self.judge()
            if failure is not None:
                return failure
            self.now_s += apart_s
        self.now_s = self.life.next_s
        failure = self.judge()
        assert failure is not None
        return failure


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unit:
    return Unit(tmp_path, monkeypatch)


@pytest.mark.parametrize("apart_s", [0.0, 0.01, SETTLE_S - 0.1])
@pytest.mark.parametrize(("end", "exit_code"), [("leaves 3", USAGE), ("killed 3", 137)])
def test_who_broke_the_others_is_blamed_in_every_order_of_arrival(
    end: str, exit_code: int, apart_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for others in ORDERS:
        for place in range(len(others) + 1):
            events = (*others[:place], end, *others[place:])
            failure = Unit(tmp_path, monkeypatch).blame(events, apart_s)
            assert failure.reason.startswith("rank 3 on localhost"), events
            assert failure.exit_code == exit_code


def test_who_ended_with_0_without_a_word_is_blamed_in_every_order(unit: Unit) -> None:
    for first, second in combinations(("0", "1"), 2):
        unit.hear(f"raises {first}")
        unit.hear(f"exits {first}")
        unit.hear(f"raises {second}")
        assert unit.judge() is None
        unit.exit("3", 0, missing="it left early")
        failure = unit.judge()
        assert failure is not None
        assert failure.reason.startswith("rank 3 on localhost ended with exit code 0, but it left early")


def test_who_said_that_it_leaves_is_judged_by_when_it_said_so(unit: Unit) -> None:
    """It may have left because it caught an error that a neighbour caused."""
    unit.hear("raises 0")
    unit.now_s += 0.1
    unit.exit("3", 0, missing="it left early", said_that_it_leaves=True)
    assert unit.judge() is None, "rank 0 may end, too"
    failure = unit.blame(("exits 0",), 0.0)
    assert failure.reason.startswith("rank 0")


def test_the_first_traceback_is_to_blame_among_those_who_raised(unit: Unit) -> None:
    failure = unit.blame(("raises 2", "raises 1", "exits 1", "exits 2"), 0.1)
    assert failure.reason.startswith("rank 2")


def test_the_wait_is_bounded(unit: Unit) -> None:
    """A neighbour that prints tracebacks again and again cannot delay the verdict for ever."""
    unit.hear("exits 0")
    began_s = unit.now_s
    while unit.judge() is None:
        unit.now_s += SETTLE_S - 0.1
        for rank in ("1", "2", "3"):
            if f"rank.{rank}" not in unit.life.agents.exits and unit.now_s < began_s + 2 * SETTLE_S:
                unit.hear(f"raises {rank}")
    assert unit.now_s <= began_s + LONGEST_SETTLE_S + SETTLE_S


def test_nobody_waits_where_nothing_can_change(unit: Unit) -> None:
    for rank in ("0", "1", "2", "3"):
        unit.hear(f"exits {rank}")
    assert unit.judge() is not None
