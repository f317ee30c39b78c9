"""Turn float32 into bytes and back: the codecs of pushes and views, and error feedback for what a codec loses.

A codec works on one chunk f32[n], a slice of a flat vector on the CPU; numbers on the wire are little endian. NaN and
infinity never vanish: a chunk that holds one decodes to a chunk that holds one, so that a later check still finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from danaz.vectors.cutting import Span

Data = bytes | bytearray | memoryview
Array = np.ndarray[Any, np.dtype[Any]]

if sys.byteorder != "little":
    raise ImportError("danaz sends little-endian floats as they lie in memory; this machine is big endian")


class CodecError(ValueError):
    """These bytes cannot be the encoding of a chunk of this size."""


class UnknownCodecError(ValueError):
    """No codec has this name."""


class Codec(Protocol):
    """A way to write a chunk as bytes."""

    @property
    def name(self) -> str:
        """The name by which users choose the codec, and by which a message declares it."""

    def encoded_bytes(self, n: int) -> int:
        """Return the largest number of bytes that a chunk of ``n`` floats can take."""

    def encode(self, chunk: Tensor) -> Data:
        """Return the bytes of ``chunk`` f32[n]. They may be the chunk's own memory."""

    def decode(self, data: Data, out: Tensor) -> None:
        """Write the decoded chunk into ``out`` f32[n]. Raises CodecError, and then leaves ``out`` unchanged."""


# ---- one encoded number for each value -----------------------------------------------------------------------------


class Fp32:
    """Write each float as it is."""

    name = "fp32"

    def encoded_bytes(self, n: int) -> int:
        return 4 * n

    def encode(self, chunk: Tensor) -> Data:
        return bytes_of(chunk)

    def decode(self, data: Data, out: Tensor) -> None:
        _expect_bytes(self, data, out)
        np.copyto(out.numpy(), np.frombuffer(data, np.float32))


class Half:
    """Write each float as two bytes, rounded to nearest even: bf16 keeps the range, fp16 keeps three more bits.

    A finite value beyond the range becomes the largest value in it. Error feedback carries the rest, so the server need
    not refuse the push.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        self.name = name
        self.dtype = dtype
        self._largest = torch.finfo(dtype).max

    def encoded_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, chunk: Tensor) -> Data:
        if chunk.numel():
            low, high = map(Tensor.item, torch.aminmax(chunk))
            if not -self._largest <= low <= high <= self._largest:
                chunk = torch.where(chunk.isinf(), chunk, chunk.clamp(-self._largest, self._largest))
        return bytes_of(chunk.to(self.dtype).view(torch.int16))

    def decode(self, data: Data, out: Tensor) -> None:
        _expect_bytes(self, data, out)
        out.copy_(_tensor_of(data, np.int16).view(self.dtype))


# ---- less than one number for each value ---------------------------------------------------------------------------

# Byte -> an int32 for each of its bits, highest first: all ones if the bit is set, otherwise all zeros.
_MASKS = -np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.int32)


class OneBit:
    """Write whether each value is positive, and the mean of each sign: 1-bit SGD (Seide et al., INTERSPEECH 2014).

    The paper keeps two means for each column of a weight matrix, so that columns of small values have a scale of their
    own. A chunk has no matrices, so it keeps two means for each ``block`` values.

    Bytes: f32[⌈n / block⌉, 2], the means of the values > 0 and of the others (0 if there are none); then ⌈n / 8⌉ bytes
    that hold one bit for each value.
    """

    name = "onebit"

    def __init__(self, block: int = 512):
        if block < 8 or block % 8:
            raise ValueError(f"a block should be a multiple of 8, not {block}")
        self.block = block

    def encoded_bytes(self, n: int) -> int:
        return 8 * -(-n // self.block) + -(-n // 8)

    def encode(self, chunk: Tensor) -> Data:
        positive = chunk.numpy() > 0
        means = np.empty((-(-chunk.numel() // self.block), 2), np.float32)
        for rows, span, width in self._parts(chunk.numel()):
            values = chunk[span].view(-1, width)
            positives = np.count_nonzero(positive[span].reshape(-1, width), axis=1)
            # float64: the sum of finite values must not become infinite.
            up = values.clamp_min(0).sum(1, dtype=torch.float64).numpy()
            down = values.clamp_max(0).sum(1, dtype=torch.float64).numpy()
            means[rows, 0] = up / np.maximum(positives, 1)
            means[rows, 1] = down / np.maximum(width - positives, 1)
        return _joined(means, np.packbits(positive))

    def decode(self, data: Data, out: Tensor) -> None:
        _expect_bytes(self, data, out)
        n = out.numel()
        raw = np.frombuffer(data, np.uint8)
        means_bytes = 8 * -(-n // self.block)
        means = raw[:means_bytes].view(np.int32).reshape(-1, 2)  # as bit patterns
        bits = raw[means_bytes:]
        for rows, span, width in self._parts(n):
            up, down = means[rows, :1], means[rows, 1:]
            target = out[span].numpy().view(np.int32).reshape(-1, width)
            if width % 8:
                target[:] = -np.unpackbits(bits[span.start // 8 :], count=width).astype(np.int32)
            else:
                packed = bits[span.start // 8 : span.stop // 8]
                np.take(_MASKS, packed, axis=0, out=target.reshape(-1, 8), mode="clip")
            # Select by mask within ``out``: (mask & (up ^ down)) ^ down.
            np.bitwise_and(target, up ^ down, out=target)
            np.bitwise_xor(target, down, out=target)

    def _parts(self, n: int) -> list[tuple[slice, slice, int]]:
        """Return (blocks, floats, floats in a block) for the whole blocks, and for the shorter last one."""
        whole = n // self.block
        parts = [
            (slice(0, whole), slice(0, whole * self.block), self.block),
            (slice(whole, whole + 1), slice(whole * self.block, n), n - whole * self.block),
        ]
        return [(rows, span, width) for rows, span, width in parts if span.stop > span.start]


class TopK:
    """Write the ⌈share · n⌉ values of largest magnitude exactly; the others become zero (Aji, Heafield, EMNLP 2017).

    Bytes: the values f32[k] in the order of their places; then the places, as steps from one to the next (the first
    from -1). A step s takes ⌊s / 255⌋ bytes of 255 and one byte of s mod 255. If magnitudes are equal, the first are
    kept.
    """

    def __init__(self, share: float):
        self.name = f"topk:{share!r}"
        self.share = share

    def kept(self, n: int) -> int:
        """Return k, the number of values that are kept if there are ``n``."""
        return min(n, ceil(self.share * n))

    def encoded_bytes(self, n: int) -> int:
        return 5 * self.kept(n) + n // 255

    def encode(self, chunk: Tensor) -> Data:
        n, k = chunk.numel(), self.kept(chunk.numel())
        if not k:
            return b""
        values = chunk.numpy()
        magnitudes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)  # ordered as the numbers are, NaN above all
        least = np.partition(magnitudes, n - k)[n - k]
        larger = np.flatnonzero(magnitudes > least)
        ties = np.flatnonzero(magnitudes == least)[: k - len(larger)]
        places = np.sort(np.concatenate([larger, ties]))
        escapes, rests = np.divmod(np.diff(places, prepend=-1), 255)
        steps = np.full(k + escapes.sum(), 255, np.uint8)
        steps[np.cumsum(escapes + 1) - 1] = rests
        return _joined(values[places], steps)

    def decode(self, data: Data, out: Tensor) -> None:
        k, most = self.kept(out.numel()), self.encoded_bytes(out.numel())
        if not 5 * k <= len(data) <= most:
            raise CodecError(f"{self.name}: {len(data)} bytes for {out.numel()} floats, {5 * k} to {most} expected")
        raw = np.frombuffer(data, np.uint8)
        values, steps = raw[: 4 * k].view(np.float32), raw[4 * k :]
        ends = np.flatnonzero(steps != 255)
        places = np.cumsum(steps, dtype=np.int64)[ends] - 1
        if len(ends) != k or (k and ends[-1] != len(steps) - 1):
            raise CodecError(f"{self.name}: places of {len(ends)} values and {len(steps)} steps, {k} values expected")
        if k and not (places[0] >= 0 and places[-1] < out.numel() and bool((places[1:] > places[:-1]).all())):
            raise CodecError(f"{self.name}: places that do not ascend within {out.numel()} floats")
        target = out.zero_().numpy()
        target[places] = values


# ---- by name -------------------------------------------------------------------------------------------------------

FP32 = Fp32()
VIEW_CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (FP32, Half("bf16", torch.bfloat16), Half("fp16", torch.float16))
}
PUSH_CODECS: dict[str, Codec] = {**VIEW_CODECS, OneBit.name: OneBit()}


def push_codec(name: str) -> Codec:
    """Return the codec ``fp32``, ``bf16``, ``fp16``, ``onebit`` or ``topk:SHARE``. Raises UnknownCodecError."""
    if name in PUSH_CODECS:
        return PUSH_CODECS[name]
    kind, _, share = str(name).partition(":")
    if kind == "topk":
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if isfinite(number) and 0 < number < 1:
            return TopK(number)
        raise UnknownCodecError(
            f"{name!r}: after topk: write the share that is kept, above 0 and below 1: topk:0.01 for a hundredth"
        )
    raise UnknownCodecError(f"no codec {name!r} for pushes; there are {', '.join(PUSH_CODECS)} and topk:SHARE")


def view_codec(name: str) -> Codec:
    """Return the codec ``fp32``, ``bf16`` or ``fp16``. Raises UnknownCodecError."""
    if name not in VIEW_CODECS:
        raise UnknownCodecError(
            f"no codec {name!r} for views; there are {', '.join(VIEW_CODECS)}. The others leave out so much that only "
            "error feedback makes up for it, and a view has none."
        )
    return VIEW_CODECS[name]


# ---- whole vectors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A vector in the form in which it travels, chunk by chunk."""

    codec: str
    nbytes: int
    chunks: tuple[Data, ...] = ()  # empty once they have been decoded

    def cut(self, first: int, end: int) -> Encoded:
        """Return the part from chunk ``first`` up to, not including, chunk ``end``."""
        chunks = self.chunks[first:end]
        return Encoded(self.codec, sum(map(len, chunks)), chunks)


def travelling_bytes(vector: Tensor, encoded: Encoded | None) -> int:
    """Return how many bytes ``vector`` f32[P] takes on the wire."""
    return 4 * vector.numel() if encoded is None else encoded.nbytes


class Compressor:
    """A lossy codec with error feedback: what a push loses is kept and added to the next push.

    So everything that was sent, plus what is kept, adds up to everything that should have been sent (Seide et al.,
    2014; Stich et al., NeurIPS 2018). What is kept changes only when the server applies the push.
    """

    def __init__(self, codec: Codec, spans: Sequence[Span], first_epoch: float = 0.0):
        """``spans`` are those of the chunks in which a push travels."""
        self.codec = codec
        self.first_epoch = first_epoch  # the cluster's epoch from which pushes are compressed
        self._spans = spans
        size = spans[-1][1] if spans else 0
        self.residual = torch.zeros(size)  # f32[P], after the last applied push
        self._next = torch.zeros(size)  # the residual if the push under way is applied
        self._under_way = False

    def compress(self, push: Tensor, epoch: float, absent: Sequence[Span] = ()) -> Encoded | None:
        """Encode ``push`` f32[P] plus what is kept, and set ``push`` to what the receiver will decode.

        Return None before ``first_epoch``. The receiver ignores the ``absent`` spans, so what is kept there stays.
        """
        if epoch < self.first_epoch:
            return None
        chunks = []
        for start, stop in self._spans:
            sent, kept = push[start:stop], self._next[start:stop]
            torch.add(sent, self.residual[start:stop], out=kept)
            data = self.codec.encode(kept)
            self.codec.decode(data, sent)
            kept.sub_(sent)
            chunks.append(data)
        for start, stop in absent:
            self._next[start:stop] = self.residual[start:stop]
            push[start:stop].zero_()
        self._under_way = True
        return Encoded(self.codec.name, sum(map(len, chunks)), tuple(chunks))

    def settle(self, applied: bool, otherwise: Sequence[Span] = ()) -> None:
        """Note whether the push under way, if there is one, was applied. In ``otherwise``, the opposite holds."""
        if not self._under_way:
            return
        self._under_way = False
        dropped, kept = (self.residual, self._next) if applied else (self._next, self.residual)
        for start, stop in otherwise:
            kept[start:stop] = dropped[start:stop]
        self.residual, self._next = kept, dropped

    def forget(self) -> None:
        """Drop what is kept, because it will never be sent."""
        self.residual.zero_()


# ---- memory --------------------------------------------------------------------------------------------------------


def bytes_of(chunk: Tensor) -> Data:
    """Return the memory of ``chunk``, not a copy. The chunk must be contiguous and on the CPU."""
    return chunk.numpy().data.cast("B") if chunk.numel() else b""


def _joined(*arrays: Array) -> bytes:
    return b"".join(array.tobytes() for array in arrays)


def _tensor_of(data: Data, dtype: type[np.generic]) -> Tensor:
    """Return the numbers in ``data`` as a tensor."""
    array = np.frombuffer(data, dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy())  # torch has no read-only tensors


def _expect_bytes(codec: Codec, data: Data, out: Tensor) -> None:
    expected = codec.encoded_bytes(out.numel())
    if len(data) != expected:
        raise CodecError(f"{codec.name}: {len(data)} bytes for {out.numel()} floats, {expected} expected")
