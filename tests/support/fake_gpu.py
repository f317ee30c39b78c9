"""A device for tests. Its streams work on tensors in host memory, at any time that their order allows."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Work = Callable[[], object]


class Stream:
    """Work in order. An entry may also be a wait until another stream has come to a certain place."""

    def __init__(self, device: FakeGpu):
        self.device = device
        self.entries: list[Work | tuple[Stream, int]] = []
        self.done = 0

    def put(self, entry: Work | tuple[Stream, int]) -> None:
        with self.device.lock:
            self.entries.append(entry)
            self.device.work_a_while()

    def wait_stream(self, other: Stream) -> None:
        self.put((other, len(other.entries)))

    def wait_event(self, event: Event) -> None:
        if event.place is not None:  # as in CUDA, nobody waits for an event that was never recorded
            self.put(event.place)

    def step(self) -> None:
        """Do the next entry if there is one and it need not wait."""
        if self.done == len(self.entries):
            return
        entry = self.entries[self.done]
        if isinstance(entry, tuple):
            other, place = entry
            if other.done < place:
                return
        else:
            entry()
        self.entries[self.done] = (self, 0)  # let go of the memory that the entry held
        self.done += 1

    def come_to(self, place: int) -> None:
        while self.done < place:
            entry = self.entries[self.done]
            if isinstance(entry, tuple):
                entry[0].come_to(entry[1])
            self.step()


class Event:
    def __init__(self, device: FakeGpu):
        self.device = device
        self.place: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        with self.device.lock:
            self.place = (stream, len(stream.entries))

    def synchronize(self) -> None:
        self.device.waits += 1
        if self.place is not None:
            with self.device.lock:
                stream, place = self.place
                stream.come_to(place)


class FakeGpu:
    """Replaces danaz.worker.staging.Cuda. ``launch`` puts work on the stream of the thread that made this object."""

    def __init__(self, seed: int, eagerness: int | None = None, launches_block: bool = False):
        self.lock = threading.RLock()
        self.launches_block = launches_block  # the thread's own stream never lags, as on a CPU
        self._random = random.Random(seed)
        # At 0, the streams work only when someone waits for them.
        self._eagerness = self._random.choice((0, 1, 2, 8)) if eagerness is None else eagerness
        self._streams: list[Stream] = []
        self._host: dict[int, Tensor] = {}  # pinned memory by address, kept so that no other tensor gets the address
        self.waits = 0  # number of times that the processor waited
        self.brought = 0  # the most floats that one copy brought from the host
        self._main = self.stream()
        self._thread = threading.get_ident()

    def work_a_while(self) -> None:
        if self.launches_block:
            self._main.come_to(len(self._main.entries))
        for _ in range(self._random.randint(0, self._eagerness)):
            self._random.choice(self._streams).step()

    def launch(self, work: Work) -> None:
        self.current_stream().put(work)

    def finish(self) -> None:
        for stream in self._streams:
            stream.come_to(len(stream.entries))

    # ---- what danaz asks for -------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        self._streams.append(Stream(self))
        return self._streams[-1]

    def event(self) -> Event:
        return Event(self)

    def current_stream(self) -> Stream:
        assert threading.get_ident() == self._thread, "the current stream is another one in each thread"
        return self._main

    def empty(self, floats: int) -> Tensor:
        return torch.full((floats,), torch.nan)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        memory = torch.full(tuple(shape), torch.nan, dtype=dtype)
        self._host[memory.untyped_storage().data_ptr()] = memory
        return memory

    def copy(self, to: Tensor, source: Tensor, stream: Stream) -> None:
        """Copy later. Memory that nobody holds may go to others, except pinned memory: torch keeps it for the copy."""
        whole = source if source._base is None else source._base
        kept = None
        if source.untyped_storage().data_ptr() in self._host:
            kept, self.brought = whole, max(self.brought, source.numel())
        place, found = (source.shape, source.stride(), source.storage_offset()), weakref.ref(whole)

        def work() -> None:
            there = kept if kept is not None else found()
            assert there is not None, "copied from memory that was given back"
            to.copy_(there.as_strided(*place))

        stream.put(work)
