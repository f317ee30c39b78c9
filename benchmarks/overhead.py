"""What danaz costs a script that runs alone (`python train.py`), beside the same script without danaz.

    python benchmarks/overhead.py                             # ResNet-20 with SGD, and a small GPT with AdamW
    python benchmarks/overhead.py --models gpt --seconds 120  # one of them, for longer
    python benchmarks/overhead.py --models gpt --profile      # where the time of danaz' steps goes, by function

Both loops live in one process and take turns of a fraction of a second, first one and then the other one ahead, so that
whatever else happens on the machine affects both alike. The result is the median over the ratios of neighbouring
turns, with the interval that holds the true median in 95 of 100 cases. On a CPU, the ratio that counts is that of
processor times, which leave out the time that other processes took; wall times stand beside it. The C library keeps
the memory that either loop frees: by default it returns some to the kernel and gets it back in thousands of page
faults a step, which hit one loop or the other by chance.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import danaz.torch as danaz
from danaz.protocol.memory import keep_freed_memory
from danaz.workloads.charlm import ALPHABET, CONTEXT, Gpt
from danaz.workloads.cifar10_resnet import ResNet

GOAL = 1.03
TURN_S = 0.25  # time of a turn: on a CPU, its processor time
WARM_UP = 5  # steps before the clock starts
MANY = 10**6  # steps, more than are ever made

Advance = Callable[[int], None]  # makes a number of steps


class Task(NamedTuple):
    """What a script trains."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]  # draws one
    optimizer: Callable[[Any], torch.optim.Optimizer]
    clips: bool  # whether the script clips gradients


def images(count: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Return a function that draws ``count`` images of CIFAR-10's size."""
    return lambda generator: (
        torch.randn(count, 3, 32, 32, generator=generator),
        torch.randint(10, (count,), generator=generator),
    )


def texts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw 16 texts, as examples/train_gpt.py does."""
    text = torch.randint(len(ALPHABET), (16, CONTEXT + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


TASKS = {
    "resnet20-32": Task("ResNet-20, batches of 32, SGD", ResNet, images(32), sgd, clips=False),
    "resnet20-128": Task("ResNet-20, batches of 128, SGD", ResNet, images(128), sgd, clips=False),
    "gpt": Task("small GPT, batches of 16 x 64 characters, AdamW, clipping", Gpt, texts, adamw, clips=True),
}


# ---- the two loops ---------------------------------------------------------------------------------------------------


def loop(
    task: Task, device: torch.device, wrap: Callable[[Any, nn.Module], Any], batches: Callable[[Any], Iterator[Any]]
) -> Advance:
    """Return a function that makes steps of a training script; the script goes on where it was."""
    torch.manual_seed(0)
    model = task.model().to(device).train()
    optimizer = wrap(task.optimizer(model.parameters()), model)
    x, y = task.batch(torch.Generator().manual_seed(0))
    # Each sample is a whole batch, so that the reading of data, which is the same, costs next to nothing.
    loader = DataLoader(TensorDataset(x.expand(MANY, *x.shape), y.expand(MANY, *y.shape)), batch_size=1)
    script = steps(model, optimizer, batches(loader), device, task.clips)

    def advance(count: int) -> None:
        for _ in range(count):
            next(script)

    return advance


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Any], device: torch.device, clips: bool
) -> Iterator[None]:
    """Make a step of the script each time that the next item is asked for."""
    for (x,), (y,) in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


def sharded(loader: DataLoader[Any]) -> Iterator[Any]:
    for epoch in danaz.epochs(1):
        yield from danaz.shard(loader, epoch)


def both(task: Task, device: torch.device) -> tuple[Advance, Advance]:
    """Return the script without danaz, and the same with danaz."""
    keep_freed_memory()
    danaz.init(seed=0)
    plain = loop(task, device, lambda optimizer, model: optimizer, iter)
    return plain, loop(task, device, danaz.DistributedOptimizer, sharded)


# ---- the measurement -------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """The seconds that a turn took."""

    processor: float
    wall: float


def timed(advance: Advance, count: int, device: torch.device) -> Times:
    processor, wall = time.process_time(), time.perf_counter()
    advance(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Times(time.process_time() - processor, time.perf_counter() - wall)


def steps_in(seconds: float, advance: Advance, device: torch.device) -> int:
    """Return how many steps take so many seconds; on a CPU, of processor time."""
    times = timed(advance, WARM_UP, device)
    return max(1, round(WARM_UP * seconds / (times.wall if device.type == "cuda" else times.processor)))


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the order statistics between which the true one lies in 95 of 100 cases."""
    ordered, count = sorted(values), len(values)
    reach = 0.98 * sqrt(count)  # 1.96 standard deviations of a binomial with p = 1/2
    low, high = max(0, int(count / 2 - reach)), min(count - 1, int(count / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def measure(task: Task, device: torch.device, seconds: float) -> None:
    """Print a line with the figures of one task."""
    plain, with_danaz = both(task, device)
    for advance in (plain, with_danaz):
        advance(WARM_UP)
    count = steps_in(TURN_S, plain, device)
    turns: list[tuple[Times, Times]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns) < 2:
        if len(turns) % 2:
            after = timed(with_danaz, count, device)
            turns.append((timed(plain, count, device), after))
        else:
            before = timed(plain, count, device)
            turns.append((before, timed(with_danaz, count, device)))
    figures = [f"{task.title}, {len(turns)} x {count} steps"]
    for number, clock in enumerate(Times._fields):
        ms = [1000 * statistics.median(pair[side][number] for pair in turns) / count for side in (0, 1)]
        ratio, low, high = median_and_interval([pair[1][number] / pair[0][number] for pair in turns])
        figures.append(f"{clock}: {ms[0]:.2f} ms, {ms[1]:.2f} ms, x {ratio:.4f} ({low:.4f} to {high:.4f})")
    print(" | ".join(figures), flush=True)


def profile(task: Task, device: torch.device, seconds: float) -> None:
    """Print the functions of danaz' steps, by the time that each takes together with what it calls."""
    _, with_danaz = both(task, device)
    with_danaz(WARM_UP)
    count = steps_in(seconds, with_danaz, device)
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(with_danaz, count)
    print(f"{task.title}: {count} steps")
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="profile instead of measuring")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        act = profile if options.profile else measure
        act(TASKS[options.models[0]], torch.device(options.device), options.seconds)
        danaz.stop("the measurement is over")
        return
    print(f"on {options.device}, {options.threads} threads; a step without danaz, with danaz, and the ratio:")
    others = ["--seconds", str(options.seconds), "--device", options.device, "--threads", str(options.threads)]
    for name in options.models:  # a process has one run of danaz
        command = [sys.executable, __file__, "--one", "--models", name, *others, *["--profile"] * options.profile]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
