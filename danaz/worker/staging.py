"""Between a worker's vectors and the memory that its link sends from and receives into.

On a CPU, or with a server in the same process, both are one and nothing is copied. On a GPU, a push leaves and a view
arrives slice by slice through pinned host memory, each on a stream of its own, while the device computes. The device's
streams wait for each other; the processor waits once in a step, in ``settle``, before the bytes are sent. In a pipeline
that is another thread, and the training loop waits for its batch instead, so that the next view is fetched as it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danaz.vectors.flat import SLICE_FLOATS

GPU_SLICE_FLOATS = 16 * SLICE_FLOATS  # 16 MB: there is no cache to stay in, and each kernel has its price


class Staging:
    """One memory for vectors and link."""

    slice_floats: int | None = None  # that are worked out, and sent, at a time; None: Layout's own

    def room(self, floats: int) -> Tensor:
        """Memory f32[floats] for a link to receive a view into."""
        return torch.empty(floats)

    def outbox(self, vector: Tensor) -> Tensor:
        """Where the link finds ``vector``, of which each slice is still to be sent there."""
        return vector

    def send(self, vector: Tensor, outbox: Tensor, start: int, stop: int) -> None:
        """Begin to bring this slice of ``vector``, as the current stream leaves it, to its outbox."""

    def lift(self, vector: Tensor) -> Tensor:
        """The outbox of all of ``vector``."""
        outbox = self.outbox(vector)
        self.send(vector, outbox, 0, len(vector))
        return outbox

    def settle(self) -> None:
        """Wait until every outbox is filled, and every room may be received into again."""

    def catch_up(self) -> None:
        """Wait until all that the current stream was given is done."""

    def arrived(self, piece: Tensor) -> None:
        """Begin to bring a slice of a room, which begins with the view's first element, to the device."""

    def load(self, params: Tensor, view: Tensor) -> None:
        """``params`` are ``view`` f32[P] for all that comes next on the current stream."""
        params.copy_(view)


IN_PLACE = Staging()


class Cuda:
    """What is needed of torch.cuda, on one device."""

    def __init__(self, device: torch.device):
        self.device = device

    def stream(self) -> Any:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def event(self) -> Any:
        # Blocking: who waits for it sleeps, and leaves the core to those who read data.
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def current_stream(self) -> Any:
        """Where this thread's work goes, which another thread's current stream need not be."""
        return torch.cuda.current_stream(self.device)

    def empty(self, floats: int) -> Tensor:
        return torch.empty(floats, device=self.device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        # From torch's cache of such memory, and back there when no one holds it, ZeroMQ included, and no copy uses it.
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, to: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)


class GpuStaging(Staging):
    """Vectors f32[P] on a GPU, a link in host memory.

    A view is gathered on the device while its last slices are on their way, and in a pipeline while the batch before is
    computed; only when it is loaded do the parameters change.
    """

    slice_floats = GPU_SLICE_FLOATS

    def __init__(self, cuda: Cuda, floats: int):
        self._cuda = cuda
        self._out, self._in = cuda.stream(), cuda.stream()  # a device copies both ways at once
        self._sent, self._received = cuda.event(), cuda.event()
        self._computed, self._loaded = cuda.event(), cuda.event()
        self._leaving: list[Tensor] = []  # device memory that must stay until it is copied
        self._gathered = cuda.empty(floats)  # f32[P], the newest view
        self._gathered_from = 0  # the room that it arrived in

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
        self._in.wait_event(self._loaded)  # the view before has been taken from there
        self._cuda.copy(self._gathered[start : start + len(piece)], piece, self._in)

    def load(self, params: Tensor, view: Tensor) -> None:
        if _room_of(view) != self._gathered_from:
            self._gather(0, view)  # it came in one piece, of memory that another may come in
            self._gathered_from = 0
        current = self._cuda.current_stream()
        current.wait_stream(self._in)
        self._cuda.copy(params, self._gathered, current)
        self._loaded.record(current)


def _room_of(vector: Tensor) -> int:
    return vector.untyped_storage().data_ptr()


def staging_for(device: torch.device, floats: int) -> Staging:
    """Between vectors f32[floats] on ``device`` and a link."""
    return GpuStaging(Cuda(device), floats) if device.type == "cuda" else IN_PLACE
