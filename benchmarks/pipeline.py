"""How much of the exchange with the server ``--pipeline`` hides, on a link of 1 Gbit/s and 1 ms. Needs root.

    sudo .venv/bin/python benchmarks/pipeline.py
    sudo .venv/bin/python benchmarks/pipeline.py --workers 1 --ratios 1.5 --repetitions 5 --csv pipeline.csv

A server and its workers are processes in network namespaces. They have real sockets and the real worker code, and push
and receive vectors of 11 MB; computing a batch is a sleep. The benchmark first measures the exchange of one worker that
computes nothing. Then it measures batches that compute for a multiple of this time, with and without the pipeline in
turns. The hidden share is 1 - (pipelined - compute) / (plain - compute), in seconds per batch, where compute is the
measured time of the sleep.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from processes import Processes, hear, write_csv
from slow_link import SlowLink, missing, slow_link
from torch import nn

from danaz.optimizers import SGD
from danaz.protocol.messages import Heartbeat, Plan
from danaz.rules import find_algorithm
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.serving.router import Router
from danaz.serving.socket import BoundRouter
from danaz.vectors.model import FlatModel
from danaz.worker.conversation import Conversation
from danaz.worker.core import Role, Step, WorkerCore
from danaz.worker.group import SoloGroup
from danaz.worker.link import DealerLink
from danaz.worker.worker import Worker

SETTLE = 10  # batches that are not measured, in which the pipeline learns how long computing and fetching take
FIGURES = ("compute_ms", "plain_ms", "pipelined_ms", "hidden_percent")
LINE = "{workers:>7} {ratio:>16}" + "".join(f" {{{name}:>{len(name)}}}" for name in FIGURES)


class Window(NamedTuple):
    """Mean seconds per batch."""

    batch_s: float
    computing_s: float


def window(link: SlowLink, workers: int, computing_s: float, pipelined: bool, options: argparse.Namespace) -> Window:
    """Start a server and its workers, and let each compute and exchange for a number of batches."""
    with Processes() as processes:
        server = processes.start(_serve, link, workers, options)
        address = hear(server)
        pipes = []
        for number in range(workers):
            way = address
            if link.needs_relay:
                way = hear(processes.start(_relay, link, 1 + number, address))
            pipes.append(processes.start(_work, link, way, number, computing_s, pipelined, options))
        windows = [hear(pipe) for pipe in pipes]
        return Window(*map(statistics.mean, zip(*windows, strict=True)))


def _relay(link: SlowLink, machine: int, address: str, tell: Connection) -> None:
    link.relay(machine, address, tell.send)


def _serve(link: SlowLink, workers: int, options: argparse.Namespace, tell: Connection) -> None:
    link.enter(0)
    torch.set_num_threads(1)
    bound = BoundRouter(f"tcp://{link.address(0)}:0")
    tell.send(bound.address)
    Router(bound).serve(ServerCore(ServerSettings(options.algorithm, workers)), None, lambda: False)


def _work(
    link: SlowLink,
    address: str,
    number: int,
    computing_s: float,
    pipelined: bool,
    options: argparse.Namespace,
    tell: Connection,
) -> None:
    link.enter(1 + number)
    torch.set_num_threads(1)
    worker = make_worker(address, number, pipelined, options)
    grad = torch.full_like(worker.flat.params, 1e-6)
    worker.join(bring_params=number == 0)
    times = []  # (begin, end) of computing each batch
    for done in itertools.count():  # until the parent kills it, so that the link stays as busy for the others
        batch, began = worker.batches.begin(), time.monotonic()
        time.sleep(computing_s)
        times.append((began, time.monotonic()))
        worker.push(Step(batch, (1e-6,), 1, None), grad)
        if done == SETTLE + options.batches:
            tell.send(_window(times[SETTLE:]))


def _window(times: Sequence[tuple[float, float]]) -> Window:
    """Return the figures of all batches but the last, whose beginning is the end of the one before."""
    (first, _), *_, (last, _) = times
    return Window((last - first) / (len(times) - 1), statistics.mean(computed - began for began, computed in times))


def make_worker(address: str, number: int, pipelined: bool, options: argparse.Namespace) -> Worker:
    """Return a worker as a training loop uses it, with one rank."""
    flat = FlatModel(nn.Linear(round(options.megabytes * 250_000), 1, bias=False))
    rule, ahead = find_algorithm(options.algorithm).rule(), 2 if pipelined else 1
    role = Role(number, 1, "", SGD, flat.layout, Plan(1 << 40, 1), ahead)
    core = WorkerCore(role, rule.worker_rule, push_moves_view=rule.push_moves_view)
    conversation = Conversation(core, DealerLink(address, Heartbeat(number, 1)))
    return Worker(SoloGroup(), flat, ahead, conversation, pipelined=pipelined)


def measure(link: SlowLink, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return a row for each number of workers and each ratio: medians over the repetitions."""
    exchange_s = window(link, 1, 0.0, False, options).batch_s
    print(f"{link.manner}; an exchange of {options.megabytes:g} MB each way takes {1000 * exchange_s:.0f} ms")
    print(LINE.format(workers="workers", ratio="compute/exchange", **{name: name for name in FIGURES}))
    rows = []
    for workers in options.workers:
        for ratio in options.ratios:
            pairs = [
                [window(link, workers, ratio * exchange_s, pipelined, options) for pipelined in (False, True)]
                for _ in range(options.repetitions)
            ]
            plain, pipelined = ([pair[which] for pair in pairs] for which in (0, 1))
            compute_s = statistics.median(w.computing_s for w in [*plain, *pipelined])
            plain_s, pipelined_s = (statistics.median(w.batch_s for w in each) for each in (plain, pipelined))
            hidden = 1 - (pipelined_s - compute_s) / (plain_s - compute_s)
            figures = (1000 * compute_s, 1000 * plain_s, 1000 * pipelined_s, 100 * hidden)
            rounded = {name: round(figure, 1) for name, figure in zip(FIGURES, figures, strict=True)}
            rows.append({"workers": workers, "ratio": ratio, **rounded})
            print(LINE.format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="time to compute over time to exchange"
    )
    parser.add_argument("--megabytes", type=float, default=11.0, help="size of the model; default: WRN-16-4")
    parser.add_argument("--algorithm", default="dana")
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of the link in Gbit/s, each way")
    parser.add_argument("--delay-ms", type=float, default=1.0, help="delay of the link, one way")
    parser.add_argument("--batches", type=int, default=15, help="measured batches of each worker")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="file to write the table to")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(f"benchmarks/pipeline.py: {reason}")
    with slow_link(1 + max(options.workers), options.gbit, options.delay_ms) as link:
        rows = measure(link, options)
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
