"""Exchanges per second of danaz' server, compared with other parameter servers and with bare transports.

    python benchmarks/server.py                                    # 1.1, 11 and 102 MB; 1, 2, 4 and 8 workers
    python benchmarks/server.py --megabytes 1.1 --workers 1 --repetitions 3
    python benchmarks/server.py --shards 1 2 --only 'danaz dana'   # also two servers with a slice each

In one exchange, a worker process pushes P floats over TCP loopback; the server applies them and sends P floats back.
Repetitions of all peers alternate, and the figures are medians. GB/s counts both directions. CPU is user plus system
time per exchange. The benchmark writes results.csv and a bar chart into --out.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from peers import PEERS, Peer, danaz, exchanges_per_second
from processes import Processes, cpu_s, hear, resident_bytes, write_csv

LINE = (
    "{megabytes:6} MB  {workers} workers  {peer:16} {exchanges_per_second:10.1f}/s {gigabytes_per_second:7.2f} GB/s  "
    "server {server_cpu_ms:8.3f} ms CPU, {server_megabytes} MB"
)


class Measured(NamedTuple):
    """The figures of one repetition."""

    exchanges_per_second: float
    server_cpu_s: float  # per exchange
    server_bytes: int  # resident at the end


def measure(peer: Peer, floats: int, workers: int, seconds: float) -> Measured:
    """Start a server and its workers, and let them exchange for about ``seconds``."""
    with Processes() as processes:
        address = hear(processes.start(_serve, peer, floats, workers))
        server = processes.all[:1]  # some peers start several processes
        pipes = [processes.start(_work, peer, address, floats, n, workers, seconds) for n in range(workers)]
        for pipe in pipes:
            hear(pipe)
        before_s = cpu_s(server)
        for pipe in pipes:
            pipe.send("go")
        rate = sum(float(hear(pipe)) for pipe in pipes)
        return Measured(rate, (cpu_s(server) - before_s) / max(1.0, rate * seconds), resident_bytes(server))


def _serve(peer: Peer, floats: int, workers: int, tell: Connection) -> None:
    torch.set_num_threads(1)
    peer.serve(tell.send, floats, workers)


def _work(peer: Peer, address: str, floats: int, worker: int, workers: int, seconds: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    exchange = peer.connect(address, floats, worker, workers)
    pipe.send("ready")
    pipe.recv()
    pipe.send(exchanges_per_second(exchange, seconds))
    pipe.recv()  # until the parent kills it: with some peers, a worker that leaves ends the world of the others


def rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    sharded = [danaz(name, shards=shards) for name in options.sharded for shards in options.shards if shards > 1]
    peers = [peer for peer in PEERS if not options.only or peer.name in options.only] + sharded
    for missing in filter(None, (peer.missing for peer in peers)):
        print(missing)
    peers = [peer for peer in peers if not peer.missing]
    for megabytes in options.megabytes:
        floats = int(megabytes * 1e6 / 4)
        for workers in options.workers:
            runs: dict[str, list[Measured]] = {peer.name: [] for peer in peers}
            for _ in range(options.repetitions):
                for peer in peers:
                    runs[peer.name].append(measure(peer, floats, workers, options.seconds))
            for name, measured in runs.items():
                rate = statistics.median(m.exchanges_per_second for m in measured)
                yield {
                    "megabytes": megabytes,
                    "workers": workers,
                    "peer": name,
                    "exchanges_per_second": round(rate, 2),
                    "gigabytes_per_second": round(2 * megabytes * rate / 1000, 3),
                    "server_cpu_ms": round(1000 * statistics.median(m.server_cpu_s for m in measured), 3),
                    "server_megabytes": round(max(m.server_bytes for m in measured) / 1e6),
                }


def draw(table: list[dict[str, object]], path: Path) -> None:
    """Draw bars of GB/s at the largest number of workers, with a panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({row["megabytes"] for row in table})
    workers = max(row["workers"] for row in table)
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(4 * len(sizes), 4), squeeze=False, layout="constrained")
    for size, ax in zip(sizes, axes[0], strict=True):
        shown = [row for row in table if row["megabytes"] == size and row["workers"] == workers]
        names = [row["peer"] for row in shown]
        colours = ["#0072B2" if name.startswith("danaz") else "#999999" for name in names]
        bars = ax.barh(names, [row["gigabytes_per_second"] for row in shown], color=colours)
        ax.bar_label(bars, fmt="%.2f", padding=2)
        ax.invert_yaxis()
        ax.set(title=f"{size} MB, {workers} workers", xlabel="GB/s, both ways")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1.1, 11, 102])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--only", nargs="+", help="names of the peers to measure; default: all")
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[1], help="numbers of server shards; 1 is always measured"
    )
    parser.add_argument("--sharded", nargs="+", default=["dana"], help="algorithms to measure with --shards")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-server"))
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.repetitions} repetitions of {options.seconds} s")
    table = []
    for row in rows(options):
        table.append(row)
        print(LINE.format(**row))
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "results.csv", table)
    draw(table, options.out / "server.png")
    print(f"results.csv and server.png are in {options.out}")


if __name__ == "__main__":
    main()
