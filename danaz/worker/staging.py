"""Staging moves data between a worker's vectors and the memory that its link sends from and receives into.

On a CPU, or with a server in the same process, both are the same memory, and nothing is copied. On a GPU, a push leaves
and a view arrives slice by slice through pinned host memory, each on its own stream, while the device computes. The
device's streams wait for each other. The processor waits once in a step, in ``settle``, before the bytes are sent. In a
pipeline another thread does this waiting. The training loop waits for its batch instead, so that the next view is
fetched just as the batch ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danaz.vectors.cutting import SLICE_FLOATS

GPU_SLICE_FLOATS = 16 * SLICE_FLOATS  # 16 MB: a slice need not fit a cache here, and each kernel costs time


class Staging:
    """Staging for vectors that the link can send from and receive into directly."""

    slice_floats: int | None = None  # number of floats worked out and sent at a time; None: Layout's own

    def room(self, floats: int) -> Tensor:
        """Return memory f32[floats] for a link to receive a view into."""
        return torch.empty(floats)

    def outbox(self, vector: Tensor) -> Tensor:
        """Return the memory where the link will find ``vector``; call ``send`` to bring each slice there."""
        return vector

    def send(self, vector: Tensor, outbox: Tensor, start: int, stop: int) -> None:
        """Begin to bring a slice of ``vector`` to its outbox, with the values that the current stream gives it."""

    def lift(self, vector: Tensor) -> Tensor:
        """Begin to bring all of ``vector`` to an outbox, and return that outbox."""
        outbox = self.outbox(vector)
        self.send(vector, outbox, 0, len(vector))
        return outbox

    def settle(self) -> None:
        """Wait until every outbox is filled, and every room is free to receive a view again."""

    def catch_up(self) -> None:
        """Wait until the current stream has done all its work."""

    def arrived(self, piece: Tensor) -> None:
        """Begin to bring ``piece``, a slice of a room that holds a view from its first element on, to the device."""

    def load(self, params: Tensor, view: Tensor) -> None:
        """Copy ``view`` f32[P] to ``params``, for all work that comes next on the current stream."""
        params.copy_(view)


IN_PLACE = Staging()


class Cuda:
    """The parts of torch.cuda that staging needs, on one device."""

    def __init__(self, device: torch.device):
        self.device = device

    def stream(self) -> Any:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def event(self) -> Any:
        # Blocking: a thread that waits for the event sleeps, and leaves the core to the processes that read data.
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def current_stream(self) -> Any:
        """Return the stream that this thread's work goes to. Another thread may have another current stream."""
        return torch.cuda.current_stream(self.device)

    def empty(self, floats: int) -> Tensor:
        return torch.empty(floats, device=self.device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        # torch takes this memory from its cache. It goes back there once no one (ZeroMQ included) holds it, and no copy
        # uses it.
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, to: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)


class GpuStaging(Staging):
    """Staging for vectors f32[P] on a GPU and a link in host memory.

    The device gathers a view while its last slices are still on their way and, in a pipeline, while it computes the
    batch before. The parameters change only when the view is loaded.
    """

    slice_floats = GPU_SLICE_FLOATS

    def __init__(self, cuda: Cuda, floats: int):
        self._cuda = cuda
        self._out, self._in = cuda.stream(), cuda.stream()  # a device can copy both ways at once
        self._sent, self._received = cuda.event(), cuda.event()
        self._computed, self._loaded = cuda.event(), cuda.event()
        self._leaving: list[Tensor] = []  # device memory that must stay until it has been copied
        self._gathered = cuda.empty(floats)  # f32[P], the newest view
        self._gathered_from = 0  # the room that the newest view arrived in

    def room(self, floats: int) -> Tensor:
        return self._cuda.pinned((floats,))

    def outbox(self, vector: Tensor) -> Tensor:
        self._leaving.append(vector)
        return self._cuda.pinned(vector.shape, vector.dtype)

    def send(self, vector: Tensor, outbox: Tensor, start: int, stop: int) -> None:
        self._out.wait_stream(self._cuda.current_stream())
        self._cuda.copy(outbox[start:stop], vector[start:stop], self._out)

    def settle(self) -> None:
        self._wait(self._sent, self._out)
        self._wait(self._received, self._in)
        self._leaving.clear()

    def catch_up(self) -> None:
        self._wait(self._computed, self._cuda.current_stream())

    def _wait(self, event: Any, stream: Any) -> None:
        event.record(stream)
        event.synchronize()

    def arrived(self, piece: Tensor) -> None:
        self._gather(int(piece.storage_offset()), piece)
        self._gathered_from = _room_of(piece)

    def _gather(self, start: int, piece: Tensor) -> None:
        self._in.wait_event(self._loaded)  # until the view before has been copied out of there
        self._cuda.copy(self._gathered[start : start + len(piece)], piece, self._in)

    def load(self, params: Tensor, view: Tensor) -> None:
        if _room_of(view) != self._gathered_from:
            self._gather(0, view)  # it came in one piece, and another view may come in the same memory
            self._gathered_from = 0
        current = self._cuda.current_stream()
        current.wait_stream(self._in)
        self._cuda.copy(params, self._gathered, current)
        self._loaded.record(current)


def _room_of(vector: Tensor) -> int:
    return vector.untyped_storage().data_ptr()


def staging_for(device: torch.device, floats: int) -> Staging:
    """Return the staging between vectors f32[floats] on ``device`` and a link."""
    return GpuStaging(Cuda(device), floats) if device.type == "cuda" else IN_PLACE
