"""What a simulated update costs, beside the same mini-batch step of a plain PyTorch loop with torch.optim.SGD.

    python benchmarks/simulator.py configs/digits.yaml
    python benchmarks/simulator.py configs/cifar10-resnet20.yaml --set data_dir=… --updates 20 --threads 2

Both take their batches from the same data set in the same way. Repetitions alternate, so that a machine whose speed
drifts slows both; the figure is the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from danaz.config import Config, load_config
from danaz.data import Batching
from danaz.simulate.simulator import Simulation
from danaz.training import batch_loss, make_sgd, place
from danaz.workloads import build


def plain_seconds(config: Config, updates: int) -> float:
    """Time of ``updates`` steps of a plain loop."""
    workload = build(config)
    device = torch.device("cpu")
    model = place(workload.model, config, device).train()
    optimizer = make_sgd(model, config)
    batching = Batching(len(workload.train), config.batch_size, seed=config.seed)
    began = time.perf_counter()
    for batch in range(updates):
        x, y = workload.train.__getitems__(batching.indices(batch).tolist())
        optimizer.zero_grad()
        loss = batch_loss(model, workload, x, y, config, device)
        loss.backward()
        optimizer.step()
        loss.item()  # as whoever prints or records the loss does
    return time.perf_counter() - began


def simulated_seconds(config: Config, updates: int) -> float:
    """Time of ``updates`` simulated updates, the start of the workers not counted."""
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(config, Path(folder))
        simulation.start()
        began = time.perf_counter()
        simulation.advance(updates)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = ["threads=null", *options.overrides]
    print(f"{options.config}, {options.threads} threads, {options.updates} updates, {options.repetitions} repetitions")
    for algorithm, gap in (("dana", "off"), ("dana", "on"), ("dana-zero", "off"), ("dana-ga", "off")):
        config = load_config(options.config, [*base, f"algorithm={algorithm}", "workers=8", f"gap={gap}"])
        ratios, plain, simulated = [], [], []
        for _ in range(options.repetitions):
            plain.append(plain_seconds(config, options.updates))
            simulated.append(simulated_seconds(config, options.updates))
            ratios.append(simulated[-1] / plain[-1])
        per_update = [1000 * statistics.median(times) / options.updates for times in (plain, simulated)]
        print(
            f"{algorithm:10} gap {gap:3}  plain {per_update[0]:7.3f} ms  simulated {per_update[1]:7.3f} ms  "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
