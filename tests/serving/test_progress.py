"""The sentences about a live run while it goes on."""

from __future__ import annotations

from itertools import pairwise

from danaz.server.records import Update
from danaz.serving.progress import FIRST_S, LONGEST_S, ProgressMeter


def update(version: int, loss: float | None = 0.5, lag: int = 1) -> Update:
    return Update(
        version, worker=0, lag=lag, lr=(0.1,), gap=None, gap_of="parameters", loss=loss, batch=version, samples=32
    )


def said(meter: ProgressMeter, updates_per_s: int, seconds: int, epochs: int = 100) -> list[tuple[float, str]]:
    """Return (when in s, sentence) of each sentence about a run with a hundred updates in an epoch."""
    sentences = []
    for version in range(1, updates_per_s * seconds + 1):
        now = 1000 + version / updates_per_s
        sentence = meter.add(update(version), version / 100, epochs, now)
        if sentence is not None:
            sentences.append((now - 1000, sentence))
    return sentences


def test_a_sentence_says_how_far_and_how_fast() -> None:
    [(_, sentence)] = said(ProgressMeter(), updates_per_s=10, seconds=6)
    assert sentence == "epoch 0.5 of 100, loss 0.5, 320 samples/s, lag 1.0, about 16 min 35 s to go"


def test_sentences_become_rare_but_never_cease() -> None:
    times = [when for when, _ in said(ProgressMeter(), updates_per_s=2, seconds=600)]
    waits = [after - before for before, after in pairwise(times)]
    assert FIRST_S <= times[0] <= FIRST_S + 1
    assert waits[:3] == [10.0, 20.0, 40.0]
    assert set(waits[3:]) == {LONGEST_S}


def test_a_short_run_says_nothing_and_neither_does_the_end() -> None:
    assert said(ProgressMeter(), updates_per_s=100, seconds=4) == []
    assert said(ProgressMeter(), updates_per_s=10, seconds=60, epochs=0) == []


def test_a_run_that_was_resumed_is_judged_by_its_own_pace() -> None:
    meter = ProgressMeter()
    meter.add(update(1), 50.0, 100, 0.0)
    assert (
        meter.add(update(2, loss=None), 51.0, 100, 10.0)
        == "epoch 51.0 of 100, 3 samples/s, lag 1.0, about 8 min 10 s to go"
    )
