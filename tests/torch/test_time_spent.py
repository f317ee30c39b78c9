"""What the server is told of a worker's time: whoever looks at a finished run sees which machine was slow, and why."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from danaz.server.settings import ServerSettings
from danaz.torch.session import Session
from scripts import Counted, ScriptCluster, make_optimizer

SAMPLES, BATCH, DELAY_S = 24, 4, 0.01
SLOW = 1  # the number of the slow worker


@pytest.mark.parametrize("slow_at", ["reading", "computing"])
@pytest.mark.parametrize("algorithm", ["dana", "dana-zero"])
def test_a_slow_worker_is_seen_and_what_makes_it_slow(algorithm: str, slow_at: str) -> None:
    cluster = ScriptCluster(ServerSettings(algorithm, workers=2))

    def delay(session: Session, at: str) -> None:
        if at == slow_at and session.place.worker == SLOW:
            time.sleep(DELAY_S)

    def train(session: Session, number: int) -> None:
        model, optimizer = make_optimizer(session)
        data = Counted(SAMPLES, number, cluster.fetched, lambda: delay(session, "reading"))
        loader = DataLoader(data, batch_size=BATCH, shuffle=True)
        for epoch in session.run_epochs(4):
            for x, y in session.run_batches(loader, epoch):
                delay(session, "computing")
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
        assert torch.isfinite(model.weight).all()

    for number in range(2):
        cluster.worker(number, train)
    cluster.run()
    told = cluster.core.summary()["per_worker"]
    delays = {"reading": sum(worker == SLOW for worker, _ in cluster.fetched)}
    delays["computing"] = cluster.batches_by_worker()[SLOW]
    assert told[str(SLOW)][f"{slow_at}_seconds"] >= delays[slow_at] * DELAY_S > 0
    assert sum(facts["updates"] for facts in told.values()) == 4 * SAMPLES // BATCH
    assert sum(facts["samples"] for facts in told.values()) == 4 * SAMPLES
    assert all(facts["exchanging_seconds"] > 0 for facts in told.values())
    assert all(facts["ranks"] == 1 and facts["device"] == "cpu" for facts in told.values())
