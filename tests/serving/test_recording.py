"""A recording keeps all that is fed to a core, and a new core fed with it gives the same replies and parameters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from axis import under
from chunked import SIZE as THREE_CHUNKS
from cluster import Cluster
from sockets import PATIENCE_S, LiveWorker, serving, settings_for, stranger, until_done
from torch import Tensor

from danaz.protocol.messages import Heartbeat, Plan, Pull, Replies, Streamed, Streams
from danaz.protocol.wire import encode
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.serving import router as router_module
from danaz.serving.recording import HEAD, Recorder, RecordingError, read_recording, recorded_settings, replay

SIZE = 1000


def said(replies: Replies) -> list[tuple[object, list[bytes]]]:
    """Return the bytes of replies as they are sent."""
    return [(route, [bytes(frame) for frame in encode(reply)]) for route, reply in replies]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording.bin"


def keep(path: Path, *events: tuple[float, bytes, list[bytes]]) -> None:
    recorder = Recorder(path, '{"seed": 1}')
    for now, route, frames in events:
        recorder.record(now, route, frames)
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

    @pytest.mark.parametrize("content", [b"", b"\x01", b"\xff\xff\xff\xff{}", b"\x02\0\0\0\xff\xfe"])
    def test_what_is_no_recording_is_named(self, content, path):
        path.write_bytes(content)
        for read in (recorded_settings, lambda path: list(read_recording(path))):
            with pytest.raises(RecordingError, match=r"recording\.bin is no (whole )?recording"):
                read(path)

    def test_a_length_beyond_the_end_takes_no_memory(self, path):
        keep(path, EVENTS[0])
        whole = path.read_bytes()
        keep(path)
        path.write_bytes(path.read_bytes() + HEAD.pack(0.5, 0, 1) + (1 << 62).to_bytes(8, "little") + whole)
        assert list(read_recording(path)) == []

    def test_settings_may_be_any_text(self, path):
        Recorder(path, "θ = 1").close()
        assert recorded_settings(path) == "θ = 1"
        assert list(read_recording(path)) == []

    def test_a_recording_cut_short_keeps_its_whole_events(self, path):
        """At whatever moment the server was killed, the recording has what came before."""
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
    """A cluster that records its server as the router does, each request before it is handled."""

    def __init__(self, path: Path, *args, **kwargs):
        self.said: list[list[tuple[object, list[bytes]]]] = []
        self.recorder = Recorder(path, "")
        super().__init__(*args, **kwargs)

    def say(self, worker, request):
        self.recorder.record(self.now, str(worker).encode(), encode(request))
        return super().say(worker, request)

    def deliver(self, replies):
        self.said.append([(str(route).encode(), frames) for route, frames in said(replies)])
        super().deliver(replies)


@under(
    {
        **dict.fromkeys(("dana", "dana-zero", "nag-asgd"), "sgd adamw"),
        **dict.fromkeys(("ssgd", "dana-ga", "bmuf"), "adamw"),
        **dict.fromkeys(("dana-nadam", "easgd"), "sgd"),
        "multi-asgd": "nadam",
    }
)
def test_a_replay_is_the_run(path, algorithm, optimizers):
    """The sizes are odd, there are several groups, and workers come in random order."""
    rng, generator = random.Random(4), torch.Generator().manual_seed(4)
    cluster = Recorded(
        path,
        algorithm,
        3,
        torch.randn(SIZE, generator=generator),
        groups=(613, 387),
        plan=Plan(batches_per_epoch=30, epochs=2),
        gap_every=1,
        optimizers=optimizers,
    )
    while not cluster.server.leases.done:
        worker = rng.choice(sorted(cluster.views) or [0])
        if len(cluster.leases(worker)) < cluster.sync_period:
            cluster.pull(worker)
            continue
        grads = [torch.randn(SIZE, generator=generator) for _ in range(cluster.sync_period)]
        rates, absent = (rng.choice([0.1, 0.01]), 0.05), rng.choice([(), (), ((100, 650),)])
        cluster.push(worker, grads, rates, samples=rng.randint(1, 9), absent=absent)
        cluster.now += rng.random()
    for worker in range(3):
        cluster.leave(worker)
    cluster.recorder.close()

    core = ServerCore(cluster.settings)
    assert [said(replies) for replies in replay(path, core)] == cluster.said
    assert torch.equal(core.master.params, cluster.server.master.params)
    assert core.summary() == cluster.server.summary()


# ---- live ------------------------------------------------------------------------------------------------------------


class Listening(ServerCore):
    """Keeps the bytes of its replies."""

    def __init__(self, settings: ServerSettings):
        super().__init__(settings)
        self.said: list[list[tuple[object, list[bytes]]]] = []

    def stream(self, route, message, now) -> Streams:
        return self._kept(super().stream(route, message, now))

    def stream_tick(self, now) -> Streams:
        return self._kept(super().stream_tick(now))

    def _kept(self, replies: Streams) -> Streams:
        """Overhear a Streamed while it is sent."""
        words: list[tuple[object, list[bytes]]] = []
        self.said.append(words)
        heard: Streams = []
        for route, reply in replies:
            words.append((route, []))
            if isinstance(reply, Streamed):
                reply = replace(reply, slices=self._overheard(reply, words[-1][1]))
            else:
                words[-1][1].extend(bytes(frame) for frame in encode(reply))
            heard.append((route, reply))
        return heard

    def _overheard(self, reply: Streamed, frames: list[bytes]) -> Iterator[Tensor]:
        pieces = []
        for piece in reply.slices:
            pieces.append(piece.clone())
            yield piece
        view = torch.cat(pieces)
        frames.extend(bytes(frame) for frame in encode(replace(reply.header, view=view)))


@under({"dana": "sgd adamw", "dana-zero": "adamw", "ssgd": "sgd"})
def test_a_recorded_live_run_replays_to_the_bit(path, monkeypatch, algorithm, optimizers):
    monkeypatch.setattr(router_module, "TICK_S", 0.005)  # so that ticks fall between messages
    settings = settings_for(workers=3, algorithm=algorithm)
    live = Listening(settings)
    with serving(live, path) as (address, server), stranger(address) as socket:
        workers = [LiveWorker(address, number, settings, Plan(20, 2), optimizers=optimizers) for number in range(3)]
        for worker in workers:
            worker.start()
            socket.send_multipart([b"garbage in between"])
        until_done(*workers)
        server.join(PATIENCE_S)
    fresh = ServerCore(settings)
    assert [said(replies) for replies in replay(path, fresh)] == live.said
    assert torch.equal(fresh.master.params, live.master.params)
    assert fresh.totals.updates == live.totals.updates == (40 if algorithm != "ssgd" else live.master.version)
    assert any(replies == [] for replies in live.said), "some are of ticks"


@under({"dana": "sgd", "dana-zero": "sgd adamw", "dana-ga": "adamw", "ssgd": "nadam"})
def test_a_recorded_run_in_chunks_replays_to_the_bit(path, algorithm, optimizers):
    settings = settings_for(workers=2, algorithm=algorithm)
    core = ServerCore(settings)
    with serving(core, path) as (address, server):
        workers = [
            LiveWorker(address, number, settings, Plan(10, 1), size=THREE_CHUNKS, optimizers=optimizers)
            for number in range(2)
        ]
        for worker in workers:
            worker.start()
        until_done(*workers)
        server.join(PATIENCE_S)
    fresh = ServerCore(settings)
    for _ in replay(path, fresh):
        pass
    assert torch.equal(fresh.master.params, core.master.params)
    assert fresh.summary() == core.summary()
    assert not core.totals.refusals
