"""Values that the ranks of one worker tell each other. Every rank must make the same calls in the same order.

Each call begins with a *meeting*: every rank says which call it makes, and with what. So ranks that make different
calls, or give values that do not fit together, get the same error at the same moment. Small values travel with the
meeting; a tensor follows it. Nothing is unpickled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from threading import Timer
from typing import Any, TypeVar

import msgpack
import torch
from torch import Tensor

from danaz.protocol.messages import MAX_REASON
from danaz.worker.group import Group

Value = TypeVar("Value", float, Tensor)

SLOT_BYTES = 256  # what each rank says first; longer news follows in a second round
SIZE_BYTES = 8  # of which these give the length of its news
PATIENCE_S = 30.0  # a rank that waits longer than this says so
ALIGNED_BYTES = 16  # the largest element of a tensor
CPU = torch.device("cpu")
OPS = ("mean", "sum", "max", "min")


class DifferentCallsError(RuntimeError):
    """The ranks of a worker have made different calls where all must make the same one."""


def allreduce(group: Group, value: Value, op: str = "mean", call: str = "danaz.allreduce") -> Value:
    """Return the mean, sum, max or min of every rank's value; see danaz.torch.allreduce."""
    if op not in OPS:
        raise ValueError(f"danaz.allreduce takes the op {', '.join(OPS[:-1])} or {OPS[-1]}, not {op!r}")
    value = _plain(value)
    if isinstance(value, Tensor):
        return _reduce_tensors(group, value, op, call)
    complaint = None
    if not isinstance(value, (bool, int, float)):
        complaint = f"{call} takes a number or a tensor, not {type(value).__name__}"
    numbers = _meet(group, f"{call} of a number", value, complaint)
    if op in ("max", "min"):
        chosen: Value = (max if op == "max" else min)(numbers)
        return chosen
    total: Value = sum(numbers)
    return total / group.size if op == "mean" else total


def allgather(group: Group, value: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks; see danaz.torch.allgather."""
    value, call = _plain(value), "danaz.allgather"
    if not isinstance(value, Tensor):
        return _meet(group, f"{call} of an object", value)
    said = _meet(group, f"{call} of a tensor", _facts(value), _sparse(value, call))
    pool = _pool(group, _bytes_of(value), [_size_of(facts) for facts in said], _common_device(value, said), call)
    return [_tensor_of(data, facts, value.device) for data, facts in zip(pool, said, strict=True)]


def broadcast(group: Group, value: Any) -> Any:
    """Return rank 0's value on every rank; see danaz.torch.broadcast."""
    value, call = _plain(value), "danaz.broadcast"
    is_first, is_tensor = group.rank == 0, isinstance(value, Tensor)
    facts = _facts(value) if is_tensor else None
    own = None if is_tensor or not is_first else value
    said = _meet(group, call, [facts, own], _sparse(value, call) if is_tensor else None)
    facts, told = said[0]
    if facts is None:
        return told
    if group.size == 1:
        return value.detach().clone()
    here = value.device if is_tensor else CPU
    is_everywhere = all(each is not None and each[2] for each, _ in said)
    room = torch.zeros(_size_of(facts), dtype=torch.uint8, device=here if is_everywhere else CPU)
    if is_first:
        room.copy_(_bytes_of(value))
    with _patience(call):
        group.broadcast(danaz_broadcast=room)
    return _tensor_of(room, facts, here)


def broadcast_object(group: Group, value: Any) -> Any:
    """Return rank 0's ``value`` on every rank.

    It may hold None, bool, int, float, str, bytes, and lists and dicts of them. Raises TypeError on every rank if rank
    0's value holds anything else.
    """
    told = _meet(group, "danaz.broadcast_object", value if group.rank == 0 else None)[0]
    return value if group.rank == 0 else told


def barrier(group: Group, call: str = "danaz.barrier") -> None:
    """Return when every rank has made this call."""
    _meet(group, call, None)


def mean(group: Group, value: Value) -> Value:
    """Return the mean of every rank's value; a tensor keeps its type and shape."""
    return allreduce(group, value, "mean", "danaz.mean")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _reduce_tensors(group: Group, value: Tensor, op: str, call: str) -> Tensor:
    complaint = _sparse(value, call)
    if op == "mean" and not (value.is_floating_point() or value.is_complex()):
        complaint = f"{call} takes the mean of floats, not of a tensor of {value.dtype}: give it value.float()"
    if op in ("max", "min") and value.is_complex():
        complaint = f"{call} finds no {op} of complex numbers"
    said = _meet(group, f"{call} of a tensor", _facts(value), complaint)
    kinds = {rank: f"{dtype}{shape}" for rank, (dtype, shape, _) in enumerate(said)}
    other = next((rank for rank, kind in kinds.items() if kind != kinds[0]), None)
    if other is not None:
        raise ValueError(
            f"{call} was given tensors of different kinds: {kinds[0]} by rank 0, {kinds[other]} by rank {other}. "
            "Every rank must give the same type and shape; danaz.allgather takes different shapes"
        )
    device = _common_device(value, said)
    if op in ("max", "min"):
        own = _bytes_of(value)
        pool = _pool(group, own, [own.numel()] * group.size, device, call)
        every = torch.stack([_tensor_of(data, said[0], device) for data in pool])
        return (every.amax(0) if op == "max" else every.amin(0)).to(value.device)
    total = value.detach().to(device, _summed_as(value.dtype), copy=True, memory_format=torch.contiguous_format)
    _sum(group, torch.view_as_real(total) if total.is_complex() else total, call)
    if op == "mean":
        total /= group.size
    kept = value.dtype if value.is_floating_point() or value.is_complex() else torch.int64
    return total.to(value.device, kept)


def _summed_as(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which to sum: wide enough, and one that every collective knows."""
    if dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int64


def _facts(value: Tensor) -> list[Any]:
    return [str(value.dtype).removeprefix("torch."), list(value.shape), value.is_cuda]


def _size_of(facts: Sequence[Any]) -> int:
    dtype: torch.dtype = getattr(torch, facts[0])
    return int(prod(facts[1])) * dtype.itemsize


def _common_device(value: Tensor, said: Sequence[Sequence[Any]]) -> torch.device:
    """Return this rank's device if all ranks gave tensors on a GPU, otherwise the CPU."""
    return value.device if all(facts[2] for facts in said) else CPU


def _bytes_of(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _tensor_of(data: Tensor, facts: Sequence[Any], device: torch.device) -> Tensor:
    return data.clone().view(getattr(torch, facts[0])).reshape(facts[1]).to(device)


def _sparse(value: Tensor, call: str) -> str | None:
    return None if value.layout is torch.strided else f"{call} takes dense tensors: give it value.to_dense()"


def _plain(value: Any) -> Any:
    """Return a NumPy scalar as Python's number, and everything else as it is."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else value


# ---- the meeting -----------------------------------------------------------------------------------------------------


def _meet(group: Group, call: str, value: Any, complaint: str | None = None) -> list[Any]:
    """Let every rank tell the others its call and ``value``, and return all values in the order of the ranks.

    Raises TypeError on every rank if one has a ``complaint``, or a value that cannot travel, and DifferentCallsError if
    the ranks make different calls.
    """
    news = b""
    if complaint is None:
        try:
            news = msgpack.packb([call, None, value], strict_types=True)
        except (TypeError, ValueError, OverflowError) as error:
            complaint = (
                f"{call.split()[0]} carries None, bool, int (of 64 bits), float, str, bytes, and lists and dicts of "
                f"them: {error}. Give tuples as lists, and arrays as .tolist()."
            )
    if complaint is not None:
        news = msgpack.packb([call, complaint, None])
    heard = [news] if group.size == 1 else _exchange(group, news, call)
    said = [msgpack.unpackb(each, strict_map_key=False) for each in heard]
    other = next((rank for rank, each in enumerate(said) if each[0] != said[0][0]), None)
    if other is not None:
        raise DifferentCallsError(
            f"rank 0 called {said[0][0]} while rank {other} of its worker called {said[other][0]}: every rank must "
            "make the same calls in the same order"
        )
    for rank, (_, why, _) in enumerate(said):
        if why:
            raise TypeError(why if rank == group.rank else f"{why} (This was the value of rank {rank}.)")
    return [value if rank == group.rank else each[2] for rank, each in enumerate(said)]


def _exchange(group: Group, news: bytes, call: str) -> list[bytes]:
    """Return every rank's news. It takes one sum over the ranks, or two if some rank's news is long."""
    beginning = len(news).to_bytes(SIZE_BYTES, "little") + news[: SLOT_BYTES - SIZE_BYTES]
    slots = _pool(group, _as_tensor(beginning.ljust(SLOT_BYTES)), [SLOT_BYTES] * group.size, CPU, call)
    said = [slot.numpy().tobytes() for slot in slots]
    sizes = [int.from_bytes(slot[:SIZE_BYTES], "little") for slot in said]
    if max(sizes) <= SLOT_BYTES - SIZE_BYTES:
        return [slot[SIZE_BYTES : SIZE_BYTES + size] for slot, size in zip(said, sizes, strict=True)]
    return [each.numpy().tobytes() for each in _pool(group, _as_tensor(news), sizes, CPU, call)]


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# ---- collectives -----------------------------------------------------------------------------------------------------


def _pool(group: Group, own: Tensor, sizes: Sequence[int], device: torch.device, call: str) -> list[Tensor]:
    """Return the bytes of every rank, uint8[size] each, where this rank has its ``own``.

    They are summed as whole numbers, to which the other ranks add 0: so they arrive to the bit, and every collective
    can do it.
    """
    if group.size == 1:
        return [own]
    starts = [0, *accumulate(-(-size // ALIGNED_BYTES) * ALIGNED_BYTES for size in sizes)]
    words = torch.zeros(starts[-1] // torch.int32.itemsize, dtype=torch.int32, device=device)
    pieces = [words.view(torch.uint8)[start:][:size] for start, size in zip(starts, sizes, strict=False)]
    pieces[group.rank].copy_(own)
    _sum(group, words, call)
    return pieces


def _sum(group: Group, tensor: Tensor, call: str) -> None:
    if group.size > 1:
        with _patience(call):
            group.wait(group.sum_async(tensor, "danaz.between"))


@contextmanager
def _patience(call: str, start: Callable[..., Timer] = Timer) -> Iterator[None]:
    """Say so if the other ranks do not come to this call within PATIENCE_S: perhaps they never will."""
    timer = start(PATIENCE_S, _say_that_it_waits, (call.split()[0],))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say_that_it_waits(call: str) -> None:
    print(
        f"danaz: this rank has waited for {PATIENCE_S:.0f} s in {call} for the other ranks of its worker. Every rank "
        "must make this call: take it out of `if danaz.is_main():` and the like.",
        file=sys.stderr,
        flush=True,
    )


def first_text(group: Group, text: str) -> str:
    """Return on every rank the text of the first rank that has one, cut to MAX_REASON characters."""
    return next((each for each in _meet(group, "danaz.stop", text[:MAX_REASON]) if each), "")
