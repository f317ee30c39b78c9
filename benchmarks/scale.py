"""How many workers one server can serve: N workers with real sockets and payloads, whose computing is a sleep.

    python benchmarks/scale.py                                   # 1 to 64 workers, ResNet-20's 0.27 M floats
    python benchmarks/scale.py --workers 1 24 --seconds 20 --algorithm dana-zero

Each worker is a thread with its own socket; a few processes run these threads, and one process is the server. For each
batch, a worker sleeps for a random time from the gamma model (mean 100 ms, coefficient of variation 0.1), pushes, and
waits for the next view. The speed-up compares the batches of all workers in a window of time with those of one worker.
The table also has the speed-up of synchronous training, which waits for the slowest of N, with an all-reduce that takes
no time. The benchmark writes scale.csv, scale.png and scale.svg into --out.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peers import Exchange, Peer, danaz
from processes import Processes, cpu_s, hear, write_csv

from danaz.report.paper import MEASURED_SPEEDUP
from danaz.report.style import COLOURS, MARKERS, RC, as_files
from danaz.simulate.execution_time import gamma_times
from danaz.simulate.speedup import speedup

SETTLE_S = 1.0  # from the first batch to the window, in which workers get out of step
DRAWS = 1000  # batch times of a worker, which repeat after the last
FIGURES = ("batches_per_second", "speedup", "synchronous", "server_busy", "workers_busy", "exchange_ms")
LINE = "{workers:>8}" + "".join(f" {{{name}:>{len(name)}}}" for name in FIGURES)


class Window(NamedTuple):
    """The figures of all workers in a window of time."""

    batches_per_second: float
    exchange_ms: float  # median
    server_busy: float  # CPU time of the server's process, divided by wall time
    workers_busy: float  # CPU time of the workers' processes, divided by wall time


def window(peer: Peer, workers: int, options: argparse.Namespace) -> Window:
    """Start a server and its workers, and measure them."""
    with Processes() as processes:
        address = hear(processes.start(_serve, peer, options.floats, workers))
        holders = [range(first, workers, options.processes) for first in range(min(workers, options.processes))]
        pipes = [processes.start(_hold, peer, address, numbers, workers, options) for numbers in holders]
        for pipe in pipes:
            hear(pipe)
        begin = time.monotonic() + SETTLE_S
        for pipe in pipes:
            pipe.send(begin)
        shares = _busy_shares([processes.all[:1], processes.all[1:]], begin, options.seconds)
        waits = [wait for pipe in pipes for wait in hear(pipe)]
        return Window(len(waits) / options.seconds, 1000 * statistics.median(waits), *shares)


def _busy_shares(groups: Sequence[Sequence[Any]], begin: float, seconds: float) -> list[float]:
    """Return the CPU time of each group of processes in the window, divided by the length of the window."""
    time.sleep(max(0.0, begin - time.monotonic()))
    began, before = time.monotonic(), [cpu_s(group) for group in groups]
    time.sleep(seconds)
    took_s = time.monotonic() - began
    return [(cpu_s(group) - earlier_s) / took_s for group, earlier_s in zip(groups, before, strict=True)]


def _serve(peer: Peer, floats: int, workers: int, tell: Connection) -> None:
    torch.set_num_threads(1)
    peer.serve(tell.send, floats, workers)


def _hold(
    peer: Peer, address: str, numbers: range, workers: int, options: argparse.Namespace, pipe: Connection
) -> None:
    """Run some of the workers, each in a thread. Sends the seconds that each exchange in the window took."""
    torch.set_num_threads(1)
    waits: list[float] = []
    joined, go, begin = threading.Barrier(len(numbers) + 1), threading.Barrier(len(numbers) + 1), [0.0]

    def work(number: int) -> None:
        exchange = peer.connect(address, options.floats, number, workers)
        times_s = gamma_times(np.random.default_rng([options.seed, number]), options.mean_s, (DRAWS,)).tolist()
        joined.wait()
        go.wait()
        waits.extend(_batches(exchange, times_s, begin[0], begin[0] + options.seconds))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in numbers]
    for thread in threads:
        thread.start()
    joined.wait()
    pipe.send("joined")
    begin[0] = pipe.recv()
    go.wait()
    for thread in threads:
        thread.join()
    pipe.send(waits)
    threading.Event().wait()  # until the parent kills it


def _batches(exchange: Exchange, times_s: Sequence[float], begin: float, end: float) -> list[float]:
    """Compute and exchange until the window is over. Returns the seconds of each exchange that ended in it."""
    waits, number = [], 0
    while True:
        time.sleep(times_s[number % DRAWS])
        began = time.monotonic()
        exchange()
        now = time.monotonic()
        if now >= end:
            return waits
        if now >= begin:
            waits.append(now - began)
        number += 1


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Return a row for each number of workers: medians over the repetitions."""
    peer = danaz(options.algorithm, gap=options.gap)
    synchronous = speedup(options.workers, heterogeneous=False, repetitions=3, iterations=20_000).synchronous
    windows: dict[int, list[Window]] = {n: [] for n in options.workers}
    for _ in range(options.repetitions):
        for n in options.workers:
            windows[n].append(window(peer, n, options))
    rates = {n: statistics.median(w.batches_per_second for w in found) for n, found in windows.items()}
    one = rates[1]
    print(LINE.format(workers="workers", **{name: name for name in FIGURES}))
    rows = []
    for n, together in zip(options.workers, synchronous, strict=True):
        row = {
            "workers": n,
            "batches_per_second": round(rates[n], 1),
            "speedup": round(rates[n] / one, 2),
            "synchronous": round(float(together), 2),
            "server_busy": round(statistics.median(w.server_busy for w in windows[n]), 3),
            "workers_busy": round(statistics.median(w.workers_busy for w in windows[n]), 3),
            "exchange_ms": round(statistics.median(w.exchange_ms for w in windows[n]), 2),
        }
        print(LINE.format(**row))
        rows.append(row)
    return rows


def draw(rows: list[dict[str, float]], algorithm: str) -> dict[str, bytes]:
    """Draw the speed-up, with the ideal, synchronous training and the paper's figure; and how busy the server is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workers = [row["workers"] for row in rows]
    with pyplot.rc_context(RC):
        figure, (ax, below) = pyplot.subplots(
            2, 1, figsize=(6.4, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
        )
        ax.plot([1, workers[-1]], [1, workers[-1]], color="#bbbbbb", linestyle="--", label="ideal: nobody waits")
        labels = {"speedup": f"danaz {algorithm}, one server", "synchronous": "SSGD, slowest of N"}
        for look, (key, label) in enumerate(labels.items()):
            ax.plot(workers, [row[key] for row in rows], color=COLOURS[look], marker=MARKERS[look], label=label)
        ax.plot(*zip(*MEASURED_SPEEDUP.items(), strict=True), "k*", markersize=11, label="DANA paper, measured")
        ax.set_ylabel("speed-up over one worker")
        ax.legend(loc="upper left")
        below.plot(workers, [100 * row["server_busy"] for row in rows], color=COLOURS[0], marker=MARKERS[0])
        below.set(xlabel="workers", ylabel="server busy, %", ylim=(0, None))
        contents = as_files(figure, "scale")
        pyplot.close(figure)
    return contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 32, 48, 64])
    parser.add_argument("--floats", type=int, default=272_474, help="size of the model; default: ResNet-20")
    parser.add_argument("--mean-s", type=float, default=0.1, help="mean time to compute a batch")
    parser.add_argument("--algorithm", default="dana")
    parser.add_argument("--gap", action="store_true", help="measure the gap of each update")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each window")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4, help="processes that run the workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-scale"))
    options = parser.parse_args()
    options.workers = sorted({1, *options.workers})
    rows = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "scale.csv", rows)
    for name, content in draw(rows, options.algorithm).items():
        (options.out / name).write_bytes(content)
    print(f"scale.csv, scale.png and scale.svg are in {options.out}")


if __name__ == "__main__":
    main()
