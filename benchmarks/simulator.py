"""What a simulated update costs, compared with the same step in a plain PyTorch loop with torch.optim.SGD.

    python benchmarks/simulator.py configs/digits.yaml
    python benchmarks/simulator.py configs/cifar10-resnet20.yaml --set data_dir=… --updates 6
    python benchmarks/simulator.py configs/cifar10-resnet20.yaml --set data_dir=… --set precision=bf16 --set device=cuda

Both read the same data set in the same way and use the same device, memory format and precision. On a GPU, the plain
loop launches its kernels one by one. All are built once and then take turns of a few updates, so that a drift in the
machine's speed affects all alike. The result is the median of the ratios of each turn. On a CPU, times are CPU times,
which do not count other processes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from danaz.run.config import Config, load_config
from danaz.simulate.simulator import Simulation
from danaz.torch.data import Batching
from danaz.workloads import build
from danaz.workloads.computing import batch_loss, choose_device, place
from danaz.workloads.train import make_optimizer

WARM_UP = 5  # updates before the clock starts
MEASURED = (("dana", "off"), ("dana", "on"), ("dana-zero", "off"), ("dana-ga", "off"))  # algorithm, gap

Advance = Callable[[int], None]


def plain_loop(config: Config) -> Advance:
    """Return a function that makes a number of steps of a plain loop."""
    device = choose_device(config)
    workload = build(config).with_data_on(device)
    model = place(workload.model, config, device).train()
    optimizer = make_optimizer(model, config)
    batching = Batching(len(workload.train), config.batch_size, seed=config.seed)
    batches = iter(range(10**9))

    def advance(updates: int) -> None:
        for _ in range(updates):
            x, y = workload.train.__getitems__(batching.indices(next(batches)).tolist())
            optimizer.zero_grad()
            loss = batch_loss(model, workload, x, y, config, device)
            loss.backward()
            optimizer.step()
            loss.item()  # a loop that prints or records the loss does this, too

    return advance


def simulation(config: Config, run: Path) -> Advance:
    """Return a function that makes a number of simulated updates."""
    made = Simulation(config, run)
    made.start()
    return made.advance


def seconds(advance: Advance, updates: int, clock: Callable[[], float]) -> float:
    began = clock()
    advance(updates)
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML of an experiment")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--updates", type=int, default=100, help="updates in each turn")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = ["threads=null", "workers=8", "epochs=1000", *options.overrides]
    print(f"{options.config} {' '.join(options.overrides)}: {options.threads} threads, {options.turns} turns of")
    device = choose_device(load_config(options.config, base))
    print(f"{options.updates} updates, on {device}")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_loop(load_config(options.config, [*base, "algorithm=baseline", "workers=1"]))
        simulated = {
            (algorithm, gap): simulation(
                load_config(options.config, [*base, f"algorithm={algorithm}", f"gap={gap}"]),
                Path(folder, f"{algorithm}-{gap}"),
            )
            for algorithm, gap in MEASURED
        }
        for advance in (plain, *simulated.values()):
            advance(WARM_UP)
        turns = [
            (
                seconds(plain, options.updates, clock),
                [seconds(each, options.updates, clock) for each in simulated.values()],
            )
            for _ in range(options.turns)
        ]
    plain_ms = 1000 * statistics.median(before for before, _ in turns) / options.updates
    for number, (algorithm, gap) in enumerate(MEASURED):
        ms = 1000 * statistics.median(times[number] for _, times in turns) / options.updates
        ratios = sorted(times[number] / before for before, times in turns)
        print(
            f"{algorithm:10} gap {gap:3}  plain {plain_ms:7.3f} ms  simulated {ms:7.3f} ms  "
            f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
