"""What a recording keeps, and that a fresh core fed with it says and computes the same, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from cluster import Cluster

from danaz.server.answers import Replies
from danaz.server.core import ServerCore
from danaz.server.messages import Heartbeat, Plan, Pull
from danaz.server.recording import Recorder, read_recording, recorded_settings, replay
from danaz.server.wire import encode

SIZE = 1000


def said(replies: Replies) -> list[tuple[object, list[bytes]]]:
    """Replies as they go out."""
    return [(route, [bytes(frame) for frame in encode(reply)]) for route, reply in replies]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording.bin"


def keep(path: Path, *events: tuple[float, bytes, list[bytes]]) -> None:
    recorder = Recorder(path, '{"seed": 1}')
    for now, route, frames in events:
        recorder.event(now, route, frames)
    recorder.close()


EVENTS = [
    (0.5, b"\x00route", [bytes(frame) for frame in encode(Pull(0, 1, 2))]),
    (0.75, b"", []),
    (1.0, b"other", [bytes(frame) for frame in encode(Heartbeat(1, 1))]),
]


class TestTheFile:
    def test_events_come_back(self, path):
        keep(path, *EVENTS)
        assert [(now, route, [bytes(f) for f in frames]) for now, route, frames in read_recording(path)] == EVENTS
        assert recorded_settings(path) == '{"seed": 1}'

    def test_settings_may_be_any_text(self, path):
        Recorder(path, "θ = 1").close()
        assert recorded_settings(path) == "θ = 1"
        assert list(read_recording(path)) == []

    def test_a_recording_cut_short_keeps_its_whole_events(self, path):
        """The server was killed: wherever that fell, what came before is there."""
        keep(path, *EVENTS)
        whole = path.read_bytes()
        keep(path)
        begin = path.stat().st_size
        kept = set()
        for length in range(begin, len(whole)):
            path.write_bytes(whole[:length])
            events = [(now, route, [bytes(f) for f in frames]) for now, route, frames in read_recording(path)]
            assert events == EVENTS[: len(events)]
            kept.add(len(events))
        assert kept == {0, 1, 2}


class Recorded(Cluster):
    """A cluster whose server is recorded, as the router does it: each request before it is handled."""

    def __init__(self, path: Path, *args, **kwargs):
        self.said: list[list[tuple[object, list[bytes]]]] = []
        self.recorder = Recorder(path, "")
        super().__init__(*args, **kwargs)

    def say(self, worker, request):
        self.recorder.event(self.now, str(worker).encode(), encode(request))
        return super().say(worker, request)

    def deliver(self, replies):
        self.said.append([(str(route).encode(), frames) for route, frames in said(replies)])
        super().deliver(replies)


@pytest.mark.parametrize(
    "algorithm", ["dana", "dana-zero", "nag-asgd", "ssgd", "dana-ga", "dana-nadam", "easgd", "bmuf"]
)
def test_a_replay_is_the_run(path, algorithm):
    """Odd sizes, several groups, workers in random order."""
    rng, generator = random.Random(4), torch.Generator().manual_seed(4)
    cluster = Recorded(
        path,
        algorithm,
        3,
        torch.randn(SIZE, generator=generator),
        groups=(613, 387),
        plan=Plan(batches_per_epoch=30, epochs=2),
        gap_every=1,
    )
    while not cluster.server.leases.done:
        worker = rng.choice(sorted(cluster.views) or [0])
        if len(cluster.leases(worker)) < cluster.sync_period:
            cluster.pull(worker)
            continue
        grads = [torch.randn(SIZE, generator=generator) for _ in range(cluster.sync_period)]
        cluster.push(worker, grads, (rng.choice([0.1, 0.01]), 0.05), samples=rng.randint(1, 9))
        cluster.now += rng.random()
    for worker in range(3):
        cluster.leave(worker)
    cluster.recorder.close()

    core = ServerCore(cluster.settings)
    assert [said(replies) for replies in replay(path, core)] == cluster.said
    assert torch.equal(core.master.params, cluster.server.master.params)
    assert core.summary() == cluster.server.summary()
