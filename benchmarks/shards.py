"""Exchanges per second with 1, 2 and 4 server shards, each on a machine with its own link. Needs root.

    sudo .venv/bin/python benchmarks/shards.py
    sudo .venv/bin/python benchmarks/shards.py --workers 4 --shards 1 4 --megabytes 102 --gbit 2.5

Servers and workers are processes in network namespaces, one per machine, with real sockets and links of 1 Gbit/s each
way. Workers compute nothing; each pushes and receives as fast as it can. The table shows the exchanges of all workers,
how much of a server's link they use in each direction, and how many cores are busy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from peers import danaz, exchanges_per_second
from processes import Processes, cpu_s, hear, write_csv
from slow_link import SlowLink, missing, slow_link

from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.serving.router import Router
from danaz.serving.socket import BoundRouter

FIGURES = ("exchanges_per_second", "times_one_server", "gigabytes_per_second", "wire_percent", "cores_busy")
LINE = "{workers:>7} {shards:>6}" + "".join(f" {{{name}:>{len(name)}}}" for name in FIGURES)


class Window(NamedTuple):
    """The figures of all workers together."""

    exchanges_per_second: float
    cores_busy: float  # CPU time of servers and workers, divided by wall time


def window(link: SlowLink, shards: int, workers: int, options: argparse.Namespace) -> Window:
    """Start servers and workers, each on its own machine, and let them exchange for a while."""
    with Processes() as processes:
        servers = [processes.start(_serve, link, shard, shards, workers, options) for shard in range(shards)]
        addresses = " ".join(hear(pipe) for pipe in servers)
        pipes = [processes.start(_work, link, addresses, number, workers, options) for number in range(workers)]
        for pipe in pipes:
            hear(pipe)
        before_s = cpu_s(processes.all)
        for pipe in pipes:
            pipe.send("go")
        rate = sum(hear(pipe) for pipe in pipes)
        return Window(rate, (cpu_s(processes.all) - before_s) / options.seconds)


def _serve(
    link: SlowLink, shard: int, shards: int, workers: int, options: argparse.Namespace, tell: Connection
) -> None:
    link.enter(shard)
    torch.set_num_threads(1)
    bound = BoundRouter(f"tcp://{link.address(shard)}:0")
    tell.send(bound.address)
    core = ServerCore(ServerSettings(options.algorithm, workers, gap_every=0, shard=shard, shards=shards))
    Router(bound).serve(core, None, lambda: False)


def _work(
    link: SlowLink, addresses: str, number: int, workers: int, options: argparse.Namespace, pipe: Connection
) -> None:
    link.enter(max(options.shards) + number)
    torch.set_num_threads(1)
    floats = round(options.megabytes * 250_000)
    exchange = danaz(options.algorithm).connect(addresses, floats, number, workers)
    pipe.send("ready")
    pipe.recv()
    pipe.send(exchanges_per_second(exchange, options.seconds))
    pipe.recv()  # until the parent kills it: the others are still measuring


def measure(link: SlowLink, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return a row for each number of workers and shards: medians over the repetitions, which alternate."""
    print(LINE.format(workers="workers", shards="shards", **{name: name for name in FIGURES}))
    rows = []
    for workers in options.workers:
        windows: dict[int, list[Window]] = {shards: [] for shards in options.shards}
        for _ in range(options.repetitions):
            for shards, found in windows.items():
                found.append(window(link, shards, workers, options))
        rates = {shards: statistics.median(w.exchanges_per_second for w in found) for shards, found in windows.items()}
        for shards, rate in rates.items():
            row = {
                "workers": workers,
                "shards": shards,
                "exchanges_per_second": round(rate, 2),
                "times_one_server": round(rate / rates[min(rates)], 2),
                "gigabytes_per_second": round(2 * rate * options.megabytes / 1000, 3),
                "wire_percent": round(100 * rate * options.megabytes / shards / (125 * options.gbit)),
                "cores_busy": round(statistics.median(w.cores_busy for w in windows[shards]), 2),
            }
            print(LINE.format(**row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--megabytes", type=float, default=11.0, help="size of the model; default: WRN-16-4")
    parser.add_argument("--algorithm", default="dana")
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of each machine's link in Gbit/s, each way")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="file to write the table to")
    options = parser.parse_args()
    options.shards = sorted({1, *options.shards})
    if reason := missing():
        sys.exit(f"benchmarks/shards.py: {reason}")
    with slow_link(max(options.shards) + max(options.workers), options.gbit, delay_ms=0.0) as link:
        print(f"{options.megabytes:g} MB each way; links: {link.manner}")
        rows = measure(link, options)
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
