"""Messages in chunks: what arrives is what was sent, and whatever else comes touches nothing."""

from __future__ import annotations

import random

import pytest
import torch
from chunked import SIZE, inbox, push_of, take_all, travelling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from danaz.protocol import wire
from danaz.protocol.inbox import Inbox, StrayChunkError
from danaz.protocol.messages import Final, Message, Push
from danaz.protocol.wire import CHUNK, CHUNK_MAGIC, MAGIC, WireError, decode, encode
from danaz.vectors.cutting import SLICE_FLOATS, is_announced


class TestInbox:
    @pytest.mark.parametrize("size", [SLICE_FLOATS + 1, 2 * SLICE_FLOATS, SIZE])
    def test_what_is_sent_is_what_arrives(self, size):
        vector = torch.randn(size, generator=torch.Generator().manual_seed(size))
        [arrived] = take_all(inbox(), travelling(push_of(vector)))
        assert isinstance(arrived, Push)
        assert torch.equal(arrived.push, vector)
        assert arrived.square == pytest.approx(float(vector.double().square().sum()), rel=1e-4)

    def test_several_vectors_one_of_them_empty(self):
        final = Final(3, 9, False, torch.arange(float(SIZE)), torch.empty(0))
        [arrived] = take_all(inbox(), travelling(final))
        assert isinstance(arrived, Final)
        assert torch.equal(arrived.params, final.params)
        assert arrived.buffers.numel() == 0

    def test_a_short_vector_travels_in_one_message(self):
        messages = travelling(push_of(torch.ones(SLICE_FLOATS)))
        assert [len(frames) for frames in messages] == [3]

    def test_peers_do_not_mix(self):
        one, other = torch.zeros(SIZE), torch.ones(SIZE)
        box, arrived = inbox(), []
        for frames, others in zip(travelling(push_of(one)), travelling(push_of(other)), strict=True):
            arrived += [box.take("a", frames), box.take("b", others)]
        pushes = [message.push for message in arrived if message is not None]
        assert len(pushes) == 2
        assert torch.equal(pushes[0], one)
        assert torch.equal(pushes[1], other)

    def test_a_header_starts_over(self):
        messages = travelling(push_of(torch.arange(float(SIZE))))
        [arrived] = take_all(inbox(), messages[:2] + messages)
        assert isinstance(arrived, Push)
        assert torch.equal(arrived.push, torch.arange(float(SIZE)))

    def test_what_is_not_wanted_gets_no_memory(self):
        rooms: list[Tensor] = []
        box = inbox(takes=False, rooms=rooms)
        header, *chunks = travelling(push_of(torch.ones(SIZE)))
        message = box.take("a", header)
        assert is_announced(message.push)
        assert message.push.numel() == SIZE
        with pytest.raises(StrayChunkError):
            box.take("a", chunks[0])
        assert not rooms

    @pytest.mark.parametrize("what", ["first of none", "skipped", "again", "of another request", "one too many"])
    def test_stray_chunks(self, what):
        header, *chunks = travelling(push_of(torch.ones(SIZE)))
        foreign = travelling(push_of(torch.ones(SIZE), request=3))[1]
        orders = {
            "first of none": [chunks[0]],
            "skipped": [header, chunks[1]],
            "again": [header, chunks[0], chunks[0]],
            "of another request": [header, foreign],
            "one too many": [header, *chunks, chunks[0]],
        }
        *before, last = orders[what]
        box = inbox()
        take_all(box, before)
        with pytest.raises(StrayChunkError):
            box.take("a", last)
        assert len(take_all(box, [header, *chunks])) == 1, "the peer can begin again"

    @pytest.mark.parametrize("data", [b"", b"1234", bytes(4 * SLICE_FLOATS - 1), bytes(4 * SLICE_FLOATS + 4)])
    def test_a_chunk_of_the_wrong_size(self, data):
        rooms: list[Tensor] = []
        box = inbox(rooms=rooms)
        header, [head, _], *_ = travelling(push_of(torch.ones(SIZE)))
        box.take("a", header)
        with pytest.raises(WireError, match="another size"):
            box.take("a", [head, data])
        assert (rooms[0] == 7).all(), "nothing was written"

    @pytest.mark.parametrize(
        "frames",
        [
            [CHUNK.pack(CHUNK_MAGIC, 2, 0)],
            [CHUNK.pack(CHUNK_MAGIC, 2, 0), b"", b""],
            [CHUNK.pack(b"DANAZ\x01+\0", 2, 0), b""],
            [bytes(CHUNK.size), b""],
        ],
    )
    def test_malformed_chunks(self, frames):
        with pytest.raises(WireError, match="not a chunk"):
            inbox().take("a", frames)

    @pytest.mark.parametrize(
        ("entry", "why"),
        [
            (["push", 1 << 60, "fp32"], "too large"),
            (["push", -1, "fp32"], "malformed"),
            (["push", True, "fp32"], "malformed"),
            (["push", 1.0, "fp32"], "malformed"),
            (["push", SIZE, "zip"], "unknown codec"),
            (["push", SIZE], "malformed"),
            ("push", "malformed"),
            (["tail", SIZE, "fp32"], "push has the wrong type"),
        ],
    )
    def test_malformed_announcements(self, entry, why):
        [_, packed], *_ = travelling(push_of(torch.ones(SIZE)))
        kind, header, _ = wire.msgpack.unpackb(packed)
        with pytest.raises(WireError, match=why):
            inbox().take("a", [MAGIC, wire.msgpack.packb([kind, header, [entry]])])

    def test_an_announcement_is_encoded_as_an_announcement(self):
        """A recording keeps an announcement in a few bytes."""
        [header, *_] = travelling(push_of(torch.ones(SIZE)))
        message = decode(header)
        assert [bytes(frame) for frame in encode(message)] == header


# ---- fuzz ------------------------------------------------------------------------------------------------------------

LIMIT_FLOATS = 2 * SIZE
PARTS = travelling(push_of(torch.ones(SIZE)))


class Limited:
    """An inbox that provides no more memory than a job's layout needs."""

    def __init__(self) -> None:
        self.given = 0
        self.box = Inbox(Message, self.takes, self.room)

    def takes(self, peer: str, message: Message) -> bool:
        return isinstance(message, Push) and message.push.numel() == SIZE

    def room(self, box: Inbox, message: Message, size: int) -> Tensor:
        self.given = max(self.given, size)
        return ROOM[:size]


ROOM = torch.empty(LIMIT_FLOATS)


def garbled(rng: random.Random) -> list[bytes]:
    frames = list(rng.choice(PARTS))
    which = rng.randrange(len(frames))
    short = frames[which] if len(frames[which]) < 1000 else frames[which][: rng.choice([0, 3, 4, 4000])]
    frame = bytearray(short)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(frame) + 1)
        match rng.randrange(4):
            case 0 if frame:
                frame[at % len(frame)] = rng.randrange(256)
            case 1:
                del frame[at : at + rng.randrange(4)]
            case 2:
                frame[at:at] = rng.randbytes(rng.randrange(6))
            case 3:
                frames.insert(rng.randrange(3), rng.randbytes(rng.choice([0, 4, CHUNK.size])))
                return frames
    frames[which] = bytes(frame)
    return frames


@given(
    st.randoms(use_true_random=False),
    st.lists(st.lists(st.binary(max_size=40), max_size=4), max_size=50),
)
@settings(max_examples=1100, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_100_000_inputs_and_never_anything_but_a_wire_error(rng, nonsense):
    limited = Limited()
    inputs = [*nonsense, *(garbled(rng) for _ in range(95))]
    assert len(inputs) >= 95  # times 1100 examples
    rng.shuffle(inputs)
    for frames in inputs:
        try:
            message = limited.box.take(rng.choice("ab"), frames)
        except WireError:
            continue
        assert message is None or isinstance(message, Message)
    assert limited.given <= SIZE
