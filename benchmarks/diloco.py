"""DiLoCo, in rounds and without: which outer rule makes the fewest errors.

    python benchmarks/diloco.py configs/digits-adam.yaml --workers 4 8 16 --set optimizer=adamw --set weight_decay=0.01

An error is the mean over the seeds, with the smallest and the largest in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from accuracy import Row, make_parser, over_seeds, print_table

from danaz.rules import find_algorithm
from danaz.simulate.simulator import simulate

OUTER = find_algorithm("async-diloco").choices["outer"]
WAYS = {
    "diloco": ["algorithm=diloco"],
    **{f"async-diloco, outer {outer}": ["algorithm=async-diloco", f"hyperparameters.outer={outer}"] for outer in OUTER},
}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for outer_lr in options.outer_lr:
        for workers in options.workers:
            for way, sets in WAYS.items():
                numbers = [
                    f"sync_period={options.period}",
                    f"hyperparameters.outer_lr={outer_lr}",
                    f"workers={workers}",
                ]
                runs = over_seeds(simulate, options.config, [*options.overrides, *sets, *numbers], options.seeds)
                yield (f"{outer_lr:g}", str(workers), way), runs


def main() -> None:
    parser = make_parser(__doc__, seeds=3)
    parser.add_argument("--period", type=int, default=10, help="local steps between pushes")
    parser.add_argument("--outer-lr", type=float, nargs="+", default=[0.7], help="rates of the outer rule")
    torch.set_num_threads(1)
    print_table(("outer lr", "workers", "algorithm"), rows(parser.parse_args()))


if __name__ == "__main__":
    main()
