"""Exchanges per second of 1, 2 and 4 servers with a slice each, every machine on a wire of its own. Needs root.

    sudo .venv/bin/python benchmarks/shards.py
    sudo .venv/bin/python benchmarks/shards.py --workers 4 --shards 1 4 --megabytes 102 --gbit 2.5

Servers and workers are processes in network namespaces, one a machine, with real sockets and links of 1 Gbit/s each
way. Workers compute nothing: each pushes and receives as fast as it can. Counted are the exchanges of all of them;
beside them stand the share of a server's wire that is full, each way, and how many cores everything keeps busy.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from peers import danaz, exchanges_per_second
from slow_link import SlowLink, missing, slow_link

from danaz.server.core import ServerCore
from danaz.server.router import Router
from danaz.server.settings import ServerSettings
from danaz.server.socket import BoundRouter

CONTEXT = multiprocessing.get_context("fork")
PATIENCE_S = 120.0
FIGURES = ("exchanges_per_second", "times_one_server", "gigabytes_per_second", "wire_percent", "cores_busy")
LINE = "{workers:>7} {shards:>6}" + "".join(f" {{{name}:>{len(name)}}}" for name in FIGURES)


class Window(NamedTuple):
    """What all workers together did."""

    exchanges_per_second: float
    cores_busy: float  # CPU time of servers and workers over wall time


def window(link: SlowLink, shards: int, workers: int, options: argparse.Namespace) -> Window:
    """Start the servers, each on a machine, and the workers on others, and let them exchange for a while."""
    children: list[Any] = []

    def start(target: Any, *arguments: Any) -> Connection:
        here, there = CONTEXT.Pipe()
        children.append(CONTEXT.Process(target=target, args=(link, *arguments, options, there), daemon=True))
        children[-1].start()
        return here

    try:
        servers = [start(_serve, shard, shards, workers) for shard in range(shards)]
        addresses = " ".join(_get(pipe) for pipe in servers)
        pipes = [start(_work, addresses, number, workers) for number in range(workers)]
        for pipe in pipes:
            _get(pipe)
        before_s = _cpu_s(children)
        for pipe in pipes:
            pipe.send("go")
        rate = sum(_get(pipe) for pipe in pipes)
        return Window(rate, (_cpu_s(children) - before_s) / options.seconds)
    finally:
        for child in children:
            child.kill()
            child.join()


def _get(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE_S):
        raise TimeoutError("a server or worker did not answer")
    return pipe.recv()


def _cpu_s(processes: Sequence[Any]) -> float:
    times = [psutil.Process(process.pid).cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


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
    pipe.recv()  # until the parent ends it: the others are still counting


def measure(link: SlowLink, options: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each number of workers and shards, medians over the repetitions, which take turns."""
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
    parser.add_argument("--megabytes", type=float, default=11.0, help="of the model; default: WRN-16-4")
    parser.add_argument("--algorithm", default="dana")
    parser.add_argument("--gbit", type=float, default=1.0, help="per second, each way, of every machine")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each window")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    options = parser.parse_args()
    options.shards = sorted({1, *options.shards})
    if reason := missing():
        sys.exit(f"benchmarks/shards.py: {reason}")
    with slow_link(max(options.shards) + max(options.workers), options.gbit, delay_ms=0.0) as link:
        print(f"{options.megabytes:g} MB each way; links: {link.manner}")
        rows = measure(link, options)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
