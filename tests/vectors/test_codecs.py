"""Codecs agree with their definitions, written as loops in float64; they refuse bad bytes; and nothing is lost."""

from __future__ import annotations

import math
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from danaz.vectors.codecs import (
    VIEW_CODECS,
    Codec,
    CodecError,
    Compressor,
    OneBit,
    TopK,
    UnknownCodecError,
    push_codec,
    view_codec,
)

NAMES = ["fp32", "bf16", "fp16", "onebit", "topk:0.01", "topk:0.3"]
LOSSY = NAMES[1:]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW = settings(deadline=None, max_examples=50)
CHUNKS = st.lists(FINITE, max_size=70).map(torch.tensor).map(Tensor.float)
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 511, 512, 513, 519, 520, 1024, 1025, 5000]


def coded(codec: Codec, chunk: Tensor) -> Tensor:
    """Return what arrives in memory that held something else, through bytes that are read-only."""
    data = bytes(codec.encode(chunk.clone()))
    assert len(data) <= codec.encoded_bytes(chunk.numel())
    out = torch.full_like(chunk, 77.0)
    codec.decode(data, out)
    return out


def drawn(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 5 - 2)


# ---- the definitions, value by value -------------------------------------------------------------------------------


def nearest(value: float, candidates: list[float]) -> float:
    """Return the nearer of two neighbours. If both are equally near, take the first, whose last bit is zero."""
    return min(candidates, key=lambda candidate: abs(candidate - value))


def bf16_of(value: float) -> float:
    """Return the upper half of the bits of a float32, rounded to nearest even, and saturated."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    below = bits & 0xFFFF0000
    neighbours = sorted((below, below + 0x10000), key=lambda b: b >> 16 & 1)
    floats = [struct.unpack("<f", struct.pack("<I", b))[0] for b in neighbours]
    finite = [f for f in floats if math.isfinite(f)]
    return nearest(value, finite)


def fp16_of(value: float) -> float:
    """Return the value as Python rounds it to a half float, saturated."""
    return float(struct.unpack("<e", struct.pack("<e", max(-65504.0, min(65504.0, value))))[0])


def one_bit_of(values: list[float], block: int) -> list[float]:
    out = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        up, down = [v for v in part if v > 0], [v for v in part if not v > 0]
        means = {True: math.fsum(up) / len(up) if up else 0.0, False: math.fsum(down) / len(down) if down else 0.0}
        out += [means[v > 0] for v in part]
    return out


def top_k_of(values: list[float], share: float) -> list[float]:
    k = math.ceil(share * len(values))
    kept = set(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k])
    return [v if i in kept else 0.0 for i, v in enumerate(values)]


class TestDefinitions:
    @given(CHUNKS)
    @FEW
    def test_fp32(self, chunk):
        assert coded(push_codec("fp32"), chunk).tolist() == chunk.tolist()

    @given(CHUNKS)
    @FEW
    @example(torch.tensor([3.4e38, -3.4e38, 1.0, 0.0, -0.0, 1e-40]))
    def test_bf16(self, chunk):
        assert coded(push_codec("bf16"), chunk).tolist() == [bf16_of(v) for v in chunk.tolist()]

    @given(CHUNKS)
    @FEW
    @example(torch.tensor([1e6, -1e6, 65504.0, 65519.0, 65520.0, 1e-8]))
    def test_fp16(self, chunk):
        assert coded(push_codec("fp16"), chunk).tolist() == [fp16_of(v) for v in chunk.tolist()]

    @given(CHUNKS, st.sampled_from([8, 16, 64, 512]))
    @FEW
    @example(torch.full((8,), 3.4e38), 512)
    @example(torch.zeros(9), 8)
    def test_one_bit(self, chunk, block):
        expected = torch.tensor(one_bit_of(chunk.tolist(), block), dtype=torch.float64)
        torch.testing.assert_close(coded(OneBit(block), chunk).double(), expected, rtol=1e-6, atol=1e-44)

    @given(CHUNKS, st.floats(0.001, 0.999))
    @FEW
    @example(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5)
    def test_top_k(self, chunk, share):
        assert coded(TopK(share), chunk).tolist() == top_k_of(chunk.tolist(), share)

    @pytest.mark.parametrize("size", SIZES)
    def test_at_every_kind_of_end(self, size):
        chunk = drawn(size, seed=size)
        values = chunk.tolist()
        torch.testing.assert_close(coded(push_codec("onebit"), chunk), torch.tensor(one_bit_of(values, 512)))
        assert coded(push_codec("topk:0.01"), chunk).tolist() == top_k_of(values, 0.01)
        assert coded(push_codec("bf16"), chunk).tolist() == [bf16_of(v) for v in values]

    def test_places_that_are_far_apart(self):
        """Steps above 255 take several bytes, and so do exact multiples of it."""
        chunk = torch.zeros(3000)
        for place in (254, 255, 510, 1276, 2999):
            chunk[place] = place
        assert torch.equal(coded(TopK(5 / 3000), chunk), chunk)

    @given(st.integers(0, 3000), st.integers(0, 2**32), st.sampled_from([0.001, 0.01, 0.1, 0.9]))
    @FEW
    def test_any_places(self, size, seed, share):
        chunk = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        assert coded(TopK(share), chunk).tolist() == top_k_of(chunk.tolist(), share)


class TestBytes:
    @pytest.mark.parametrize(
        ("name", "times"), [("fp32", 1), ("bf16", 2), ("fp16", 2), ("onebit", 25), ("topk:0.01", 70)]
    )
    def test_by_which_factor_a_push_shrinks(self, name, times):
        chunk = drawn(100_000)
        assert 4 * chunk.numel() / len(push_codec(name).encode(chunk)) >= times

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("size", SIZES)
    def test_never_more_bytes_than_announced(self, name, size):
        for seed in range(5):
            coded(push_codec(name), drawn(size, seed))

    def test_the_worst_places_for_top_k(self):
        chunk = torch.zeros(1000)
        chunk[-10:] = 1
        assert len(TopK(0.01).encode(chunk)) == 5 * 10 + 990 // 255 <= TopK(0.01).encoded_bytes(1000)

    def test_a_float_is_not_copied_where_it_stays_as_it_is(self):
        chunk = torch.zeros(3)
        data = push_codec("fp32").encode(chunk)
        chunk[1] = 1
        assert bytes(data) == struct.pack("<3f", 0, 1, 0)


class TestNotFinite:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(("size", "place"), [(1, 0), (9, 8), (600, 3), (600, 599), (600, 511)])
    def test_it_does_not_vanish(self, name, bad, size, place):
        chunk = drawn(size)
        chunk[place] = bad
        assert not coded(push_codec(name), chunk).isfinite().all()

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_finite_stays_so(self, name):
        largest = torch.finfo(torch.float32).max
        for chunk in (
            torch.full((600,), largest),
            torch.full((600,), -largest),
            torch.tensor([largest, -largest] * 300),
        ):
            assert coded(push_codec(name), chunk).isfinite().all()

    @pytest.mark.parametrize("name", ["bf16", "fp16"])
    def test_infinity_beside_what_is_too_large(self, name):
        chunk = coded(push_codec(name), torch.tensor([math.inf, 3.4e38, math.nan, -math.inf, 1.0]))
        assert [chunk[0], chunk[3], chunk[4]] == [math.inf, -math.inf, 1.0]
        assert chunk[2].isnan()


class TestMalformed:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("size", [0, 1, 9, 513, 1000])
    @pytest.mark.parametrize("change", [-1, +1, +1000])
    def test_a_wrong_length(self, name, size, change):
        codec = push_codec(name)
        data = bytes(codec.encode(drawn(size)))
        data = data + bytes(change) if change > 0 else data[:change]
        if size or change > 0:
            self.refused(codec, data, size, r"floats, \d+( to \d+)? expected|places")

    @pytest.mark.parametrize(
        ("steps", "why"),
        [
            ([1, 0], "do not ascend"),  # twice the same place
            ([0, 1], "do not ascend"),  # a place before the first
            ([1, 10], "do not ascend"),  # after the last
            ([1, 255], "places of 1 values and 2 steps, 2 values expected"),
            ([255, 1], "places of 1 values and 2 steps, 2 values expected"),
        ],
    )
    def test_invalid_places(self, steps, why):
        self.refused(TopK(0.2), struct.pack("<2f", 1, 2) + bytes(steps), 10, why)

    def test_a_step_too_many(self):
        codec = TopK(1 / 600)
        self.refused(codec, struct.pack("<f", 1) + bytes([255, 1, 255]), 600, "places of 1 values")

    def refused(self, codec: Codec, data: bytes, size: int, why: str) -> None:
        out = torch.full((size,), 5.0)
        with pytest.raises(CodecError, match=why):
            codec.decode(data, out)
        assert out.tolist() == [5.0] * size, "nothing was written"

    @given(st.sampled_from(NAMES), st.integers(0, 600), st.binary(max_size=200))
    @settings(FEW, max_examples=200)
    def test_any_bytes(self, name, size, data):
        """Any bytes are a chunk or raise CodecError, and nothing beside the chunk is written."""
        memory = torch.full((size + 2,), 5.0)
        with suppress(CodecError):
            push_codec(name).decode(data, memory[1:-1])
        assert (memory[0], memory[-1]) == (5.0, 5.0)

    @given(st.sampled_from(["fp32", "bf16", "fp16", "onebit"]), st.data())
    @settings(FEW, max_examples=100)
    def test_any_bytes_of_the_right_length_are_a_chunk(self, name, data):
        """Every pattern is a number, a sign or a mean. The server checks whether they are finite."""
        size, codec = data.draw(st.integers(1, 60)), push_codec(name)
        count = codec.encoded_bytes(size)
        out = torch.full((size,), math.nan)
        codec.decode(data.draw(st.binary(min_size=count, max_size=count)), out)
        again = torch.full((size,), math.nan)
        codec.decode(codec.encode(out.clone()), again)
        if name != "onebit":
            assert torch.equal(again.isnan(), out.isnan())
            assert again.nan_to_num().tolist() == out.nan_to_num().tolist()


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_codec_knows_its_name(self, name):
        assert push_codec(name).name == name
        assert push_codec(push_codec(name).name).encoded_bytes(999) == push_codec(name).encoded_bytes(999)

    @pytest.mark.parametrize("share", [1 / 3, 0.1 + 0.2, 1e-7, 0.123456789012345])
    def test_a_share_survives_its_name(self, share):
        """Both sides must keep the same number of values."""
        codec = TopK(share)
        again = push_codec(codec.name)
        assert isinstance(again, TopK)
        assert again.share == share

    @pytest.mark.parametrize("name", ["", "fp8", "onebit:8", "FP32", "topk", "bf16 "])
    def test_unknown(self, name):
        with pytest.raises(UnknownCodecError, match=r"fp32, bf16, fp16, onebit and topk:SHARE|topk:0.01"):
            push_codec(name)

    @pytest.mark.parametrize("name", ["topk:", "topk:0", "topk:1", "topk:-0.1", "topk:nan", "topk:inf", "topk:x"])
    def test_an_invalid_share(self, name):
        with pytest.raises(UnknownCodecError, match="above 0 and below 1"):
            push_codec(name)

    @pytest.mark.parametrize("name", ["onebit", "topk:0.1", "x"])
    def test_a_view_has_no_codec_that_needs_error_feedback(self, name):
        with pytest.raises(UnknownCodecError, match="for views; there are fp32, bf16, fp16"):
            view_codec(name)
        assert set(VIEW_CODECS) == {"fp32", "bf16", "fp16"}

    @pytest.mark.parametrize("block", [0, -8, 12])
    def test_a_block_of_whole_bytes(self, block):
        with pytest.raises(ValueError, match="multiple of 8"):
            OneBit(block)


class TestErrorFeedback:
    SPANS = ((0, 700), (700, 711), (711, 1300))

    def compressor(self, name: str) -> Compressor:
        return Compressor(push_codec(name), self.SPANS)

    @pytest.mark.parametrize("name", LOSSY)
    def test_what_was_sent_and_what_is_kept_add_up_to_everything(self, name):
        compressor, total, sent = self.compressor(name), np.zeros(1300), np.zeros(1300)
        for seed in range(30):
            push = drawn(1300, seed=5 * seed + 2)
            total += push.numpy()
            compressor.compress(push, 0.0)
            sent += push.numpy()
            compressor.settle(applied=True)
        np.testing.assert_allclose(sent + compressor.residual.numpy(), total, atol=1e-3)
        assert np.abs(compressor.residual.numpy()).max() > 0, "the test needs a codec that loses something"

    @pytest.mark.parametrize("name", LOSSY)
    def test_the_push_becomes_what_is_decoded(self, name):
        compressor, push = self.compressor(name), drawn(1300)
        before = push.clone()
        encoded = compressor.compress(push, 0.0)
        decoded = torch.empty(1300)
        for (start, stop), data in zip(self.SPANS, encoded.chunks, strict=True):
            push_codec(encoded.codec).decode(data, decoded[start:stop])
        assert torch.equal(decoded, push)
        assert not torch.equal(push, before)
        assert encoded.nbytes == sum(len(data) for data in encoded.chunks) < 4 * 1300

    @pytest.mark.parametrize("name", LOSSY)
    @pytest.mark.parametrize("applied", [True, False])
    def test_one_slice_may_be_refused_alone(self, name, applied):
        one, other = self.compressor(name), self.compressor(name)
        for compressor in (one, other):
            compressor.compress(drawn(1300, 0), 0.0)
            compressor.settle(applied=True)
        before = one.residual.clone()
        for compressor in (one, other):
            compressor.compress(drawn(1300, 1), 0.0)
        one.settle(applied, otherwise=[(700, 711)])
        other.settle(applied=True)
        most, few = (other.residual, before) if applied else (before, other.residual)
        assert torch.equal(one.residual, torch.cat([most[:700], few[700:711], most[711:]]))
        assert not torch.equal(most[700:711], few[700:711])

    @pytest.mark.parametrize("name", LOSSY)
    def test_a_refused_push_leaves_no_trace(self, name):
        one, other = self.compressor(name), self.compressor(name)
        for seed in range(9):
            if seed % 3 == 1:
                one.compress(torch.full((1300,), math.nan) if seed == 4 else drawn(1300, seed + 100), 0.0)
                one.settle(applied=False)
            a, b = drawn(1300, seed), drawn(1300, seed)
            assert one.compress(a, 0.0) == other.compress(b, 0.0)
            assert torch.equal(a, b)
            one.settle(applied=True)
            other.settle(applied=True)
            one.settle(applied=True)  # the answer to another request than a push
            assert torch.equal(one.residual, other.residual)
