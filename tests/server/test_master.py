"""The master applies an update slice by slice as the next view is taken, and never when its parameters are read."""

from __future__ import annotations

import threading

import pytest
import torch

from danaz.rules import find_algorithm
from danaz.server.master import Master, UnsettledError
from danaz.server.members import Member
from danaz.vectors.cutting import SLICE_FLOATS
from danaz.vectors.layout import Layout

PATIENCE_S = 30.0
SIZE = 2 * SLICE_FLOATS
LAYOUT = Layout.from_lists([[["w", [SIZE], [1]]], [], [SIZE]])


def master_with_member() -> tuple[Master, Member]:
    master = Master(find_algorithm("dana").rule(momentum=0.9), LAYOUT, torch.zeros(SIZE))
    member = Member(0, 1, b"", 1, 1, {}, 0.0)
    master.enter(member)
    return master, member


def test_parameters_cannot_be_read_during_an_update():
    master, member = master_with_member()
    assert master.apply(torch.ones(SIZE), 1.0, (0.1,), member, 0)
    with pytest.raises(UnsettledError, match="update 1"):
        _ = master.params
    master.settle()
    assert torch.equal(master.params, torch.ones(SIZE))


def test_another_thread_that_reads_does_not_drive_the_update(monkeypatch):
    """Read the parameters in one thread while another thread, which takes a view, is within a slice."""
    master, member = master_with_member()
    in_the_slice, go_on = threading.Event(), threading.Event()
    apply = type(master.rule).apply

    def slow_apply(*args: object) -> None:
        in_the_slice.set()
        assert go_on.wait(PATIENCE_S)
        apply(*args)

    monkeypatch.setattr(type(master.rule), "apply", slow_apply)
    assert master.apply(torch.ones(SIZE), 1.0, (0.1,), member, 0)
    taken: list[torch.Tensor] = []
    taking = threading.Thread(
        target=lambda: taken.extend(piece.clone() for piece in master.take_view(member, keep=False))
    )
    taking.start()
    assert in_the_slice.wait(PATIENCE_S)
    try:
        with pytest.raises(UnsettledError):
            _ = master.params
        with pytest.raises(UnsettledError):
            _ = master.is_finite
    finally:
        go_on.set()
        taking.join(PATIENCE_S)
    assert torch.equal(torch.cat(taken), torch.ones(SIZE))
    assert torch.equal(master.params, torch.ones(SIZE))
    assert master.is_finite
