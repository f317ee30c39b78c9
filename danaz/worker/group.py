"""The ranks of one worker. They use Horovod, or torch.distributed if that is asked for or Horovod is missing."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import socket
import time
from typing import Any, Protocol

import torch
from torch import Tensor

POLL_S = 1e-4


class Group(Protocol):
    """A synchronous world of ranks. Every rank must make the same calls in the same order."""

    name: str
    rank: int
    size: int

    def sum_async(self, tensor: Tensor, name: str) -> Any:
        """Begin to sum ``tensor`` over the ranks, in place, and return a handle for ``wait``."""

    def wait(self, handle: Any) -> None:
        """Return when the tensor of ``handle`` holds the sum."""

    def broadcast(self, **tensors: Tensor) -> None:
        """Overwrite each of ``tensors`` with rank 0's."""

    def close(self) -> None:
        """Leave the world."""


class SoloGroup:
    """A world of one process, which was started without a launcher."""

    name = "none"
    rank = 0
    size = 1

    def sum_async(self, tensor: Tensor, name: str) -> None:
        return None

    def wait(self, handle: None) -> None:
        return None

    def broadcast(self, **tensors: Tensor) -> None:
        return None

    def close(self) -> None:
        return None


class HorovodGroup:
    """A Horovod world."""

    name = "horovod"

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()

    def sum_async(self, tensor: Tensor, name: str) -> Any:
        return self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum)

    def wait(self, handle: Any) -> None:
        # Horovod's own wait spins on sched_yield. If ranks share cores, the spinning takes the cores from the very
        # threads that it waits for: with four ranks on two cores, a sum takes two to three times as long.
        while not self._hvd.poll(handle):
            time.sleep(POLL_S)
        self._hvd.synchronize(handle)

    def broadcast(self, **tensors: Tensor) -> None:
        # All broadcasts are begun before the first wait, so that they travel in one cycle of Horovod.
        handles = [self._hvd.broadcast_async_(tensor, root_rank=0, name=name) for name, tensor in tensors.items()]
        for handle in handles:
            self.wait(handle)

    def close(self) -> None:
        self._hvd.shutdown()


class TorchGroup:
    """A torch.distributed world: gloo on CPUs, NCCL on GPUs."""

    name = "torch"

    def __init__(self) -> None:
        import torch.distributed as dist

        # torch's optimizers import this module sooner or later. If a process group exists by then, the module keeps a
        # part of it: its threads outlive destroy_process_group(), and sometimes abort the process as the interpreter
        # ends.
        importlib.import_module("torch._dynamo")

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=self._meeting_place(), rank=self.rank, world_size=self.size)
        self._dist = dist
        self._ranks: Any = None  # torch's object for these ranks; None: that of the whole world

    def _meeting_place(self) -> Any:
        """Return the store at which the ranks find each other. It listens only on the world's own address.

        By default, torch's store would listen on every network interface of the machine.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if self.rank > 0:
            return TCPStore(address, port, self.size)
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family, backlog=self.size)
        return TCPStore(address, port, self.size, is_master=True, master_listen_fd=listener.detach())

    def sum_async(self, tensor: Tensor, name: str) -> Any:
        return self._dist.all_reduce(tensor, group=self._ranks, async_op=True)

    def wait(self, handle: Any) -> None:
        handle.wait()

    def broadcast(self, **tensors: Tensor) -> None:
        for tensor in tensors.values():
            self._dist.broadcast(tensor, src=0, group=self._ranks)

    def apart(self) -> TorchGroup:
        """See the function ``apart``. Every rank must call it."""
        other = copy.copy(self)
        other._ranks = self._dist.new_group()
        return other

    def close(self) -> None:
        self._dist.destroy_process_group()


def apart(group: Group) -> Group:
    """Return a world of the same ranks, whose sums are made in an order of their own, whatever ``group`` sums.

    Horovod tells sums apart by their names, but torch.distributed by their order. Every rank must call it.
    """
    return group.apart() if isinstance(group, TorchGroup) else group


class CollectiveError(RuntimeError):
    """The collective that the user asked for is not available."""


def choose_collective(wanted: str) -> tuple[str, str]:
    """Return the collective for ``wanted`` (auto, horovod or torch), and a sentence that says why it was chosen.

    Raises CollectiveError if it is not available.
    """
    if wanted not in ("auto", "horovod", "torch"):
        raise CollectiveError(f"unknown collective {wanted!r}: give auto, horovod or torch")
    installed = importlib.util.find_spec("horovod") is not None
    if wanted == "torch":
        return "torch", "collective: torch.distributed, as asked for"
    if installed:
        return "horovod", "collective: Horovod"
    if wanted == "horovod":
        raise CollectiveError("Horovod is not installed here. Run `danaz horovod install`, or use --collective torch.")
    return "torch", "collective: torch.distributed, because Horovod is not installed (`danaz horovod install` adds it)"


def make_group(collective: str) -> Group:
    """Return the world that this process was launched into."""
    groups: dict[str, type[Group]] = {"none": SoloGroup, "horovod": HorovodGroup, "torch": TorchGroup}
    return groups[collective]()
