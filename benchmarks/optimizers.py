"""Adam under asynchrony: where its state is kept, and whether the views look ahead.

    python benchmarks/optimizers.py configs/digits-adam.yaml --workers 1 16 32 --seeds 2 --lr 0.001 0.003

An error is the mean over the seeds, with the smallest and the largest in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from accuracy import Row, make_parser, over_seeds, print_table

from danaz.simulate.simulator import simulate

WAYS = {
    "nag-asgd": "one state on the server",
    "multi-asgd": "a state for each worker, looking ahead along its own",
    "dana-zero": "a state for each worker, looking ahead along all",
    "dana": "the same, with the states on the workers",
    "dana-nadam": "a first moment for each worker, one second moment",
}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for lr in options.lr:
        for workers in options.workers:
            for algorithm, way in WAYS.items():
                sets = [*options.overrides, f"algorithm={algorithm}", f"lr={lr}", f"workers={workers}"]
                runs = over_seeds(simulate, options.config, sets, options.seeds)
                yield (f"{lr:g}", str(workers), algorithm, way), runs


def main() -> None:
    parser = make_parser(__doc__, seeds=2)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates")
    torch.set_num_threads(1)
    print_table(("lr", "workers", "algorithm", "state"), rows(parser.parse_args()))


if __name__ == "__main__":
    main()
