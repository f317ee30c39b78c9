"""Compressed vectors on the wire arrive as their sender decoded them, in one message or in chunks."""

from __future__ import annotations

import msgpack
import pytest
import torch
from chunked import travelling
from cluster import DIGEST, layout_of
from sockets import PATIENCE_S, serving
from torch import Tensor

from danaz.optimizers import SGD
from danaz.protocol.inbox import Inbox
from danaz.protocol.messages import Heartbeat, Parameters, Plan, Push, Reply, Request, Streamed
from danaz.protocol.wire import CHUNK, WireError, decode, encode
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.vectors.codecs import Compressor, push_codec, view_codec
from danaz.vectors.cutting import SLICE_FLOATS, announced, chunks
from danaz.worker.core import Role, Step, WorkerCore
from danaz.worker.link import DealerLink

SMALL, LARGE = 1000, 2 * SLICE_FLOATS + 77
LOSSY = ["bf16", "fp16", "onebit", "topk:0.01"]


def drawn(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def compressed(codec: str, size: int) -> Push:
    vector = drawn(size)
    encoded = Compressor(push_codec(codec), list(chunks(size))).compress(vector, 0.0)
    return Push(1, 1, 7, 3, (0.1,), 8, 0.5, 2, vector, encoded=encoded)


def inbox(expect: object = Request) -> Inbox:
    return Inbox(expect, lambda peer, message: True, lambda inbox, message, size: torch.full((size,), 9.0))


def arrived(sent: list[list[bytes]], expect: object = Request) -> object:
    receiver = inbox(expect)
    *none, message = [receiver.take("peer", frames) for frames in sent]
    assert none == [None] * len(none)
    return message


@pytest.mark.parametrize("size", [SMALL, SLICE_FLOATS, LARGE])
class TestTravels:
    @pytest.mark.parametrize("codec", LOSSY)
    def test_a_push(self, codec, size):
        push = compressed(codec, size)
        sent = travelling(push)
        there = arrived(sent)
        assert isinstance(there, Push)
        assert torch.equal(there.push, push.push)
        assert (there.encoded.codec, there.encoded.nbytes) == (codec, push.encoded.nbytes)
        assert sum(len(frame) for frames in sent for frame in frames) < push.encoded.nbytes + 1000 < 4 * size

    @pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
    def test_a_view(self, codec, size):
        view = drawn(size)
        for start, stop in chunks(size):
            view_codec(codec).decode(view_codec(codec).encode(view[start:stop].clone()), view[start:stop])
        header = Parameters(7, 1, True, "", (), False, 0.0, 0, None, announced(size))
        streamed = Streamed(header, (view[start:stop] for start, stop in chunks(size)), view_codec(codec))
        there = arrived(travelling(streamed), Reply)
        assert isinstance(there, Parameters)
        assert torch.equal(there.view, view), "which was as the worker decodes it"

    def test_a_recording_keeps_what_was_decoded(self, size):
        push = compressed("onebit", size)
        assert torch.equal(decode([bytes(frame) for frame in encode(push)]).push, push.push)


class TestGarbage:
    def test_a_codec_that_nobody_has(self):
        (head, header, data), *_ = travelling(compressed("bf16", SMALL))
        kind, fields, [[name, size, _]] = msgpack.unpackb(header)
        for codec in ("fp8", "topk:2", "", 7, None):
            with pytest.raises(WireError, match=r"unknown codec|malformed"):
                decode([head, msgpack.packb([kind, fields, [[name, size, codec]]]), data])

    @pytest.mark.parametrize("codec", LOSSY)
    @pytest.mark.parametrize("size", [SMALL, LARGE])
    @pytest.mark.parametrize("change", [b"", b"\0" * 5000])
    def test_bytes_that_do_not_fit(self, codec, size, change):
        sent = travelling(compressed(codec, size))
        sent[-1][-1] = sent[-1][-1] + change if change else sent[-1][-1][:-1]
        with pytest.raises(WireError, match="codec"):
            arrived(sent)

    def test_a_few_bytes_do_not_become_many_floats(self):
        (head, header, data), *_ = travelling(compressed("onebit", SMALL))
        kind, fields, [[name, _, codec]] = msgpack.unpackb(header)
        with pytest.raises(WireError, match="should come in chunks"):
            decode([head, msgpack.packb([kind, fields, [[name, 2**33, codec]]]), data])

    def test_chunks_in_another_order(self):
        head, first, second, *_ = travelling(compressed("onebit", LARGE))
        assert len(first[0]) == CHUNK.size
        receiver = inbox()
        assert receiver.take("peer", head) is None
        with pytest.raises(WireError, match="no message under way"):
            receiver.take("peer", second)


# ---- live ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("codec", [*LOSSY, "fp32"])
def test_live_is_what_was_simulated(codec, size):
    """A worker and a server give the same bits over a socket as within a process, with fewer bytes."""
    settings = ServerSettings("dana", 1, DIGEST, wire_view="fp16")

    def trained(exchange, core: WorkerCore) -> Tensor:  # type: ignore[no-untyped-def]
        reply = exchange(core.join(torch.zeros(size)))
        core.receive(reply)
        for step in range(6):
            reply = exchange(core.push(Step(step, (0.1,), 1, 1.0), reply.view - drawn(size, step)))
            assert reply.applied
            core.receive(reply)
        view: Tensor = reply.view.clone()
        return view

    def worker() -> WorkerCore:
        role = Role(0, 1, DIGEST, SGD, layout_of(size), Plan(100, 1))
        compressor = None if codec == "fp32" else Compressor(push_codec(codec), list(chunks(size)))
        return WorkerCore(role, settings.rule().worker_rule, compressor=compressor)

    within = ServerCore(settings)
    simulated = trained(lambda request: within.handle(0, request, 0.0)[0][1], worker())
    live = ServerCore(settings)
    with serving(live) as (address, _):
        link = DealerLink(address, Heartbeat(0, 1), give_up_s=PATIENCE_S)
        try:
            arrived = trained(link.exchange, worker())
        finally:
            link.close()
    assert torch.equal(arrived, simulated)
    assert torch.equal(live.master.params, within.master.params)
    assert live.totals.push_bytes == within.totals.push_bytes
    assert live.totals.view_bytes == within.totals.view_bytes == 7 * 2 * size
