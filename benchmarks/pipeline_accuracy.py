"""What ``--pipeline`` costs in accuracy, compared with a naive way to compute while exchanging, in simulated runs.

    python benchmarks/pipeline_accuracy.py configs/digits.yaml --workers 4 8 --seeds 3

Workers push in round-robin order, which fixes the lag. An error is the mean over the seeds, with the smallest and the
largest in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accuracy import Row, Summary, make_parser, over_seeds, print_table

from danaz.rules import find_algorithm
from danaz.run.config import Config
from danaz.simulate.simulator import SimulatedWorker, Simulation


class Naive(Simulation):
    """Compute each batch on the view from before the last push, which has arrived a whole batch earlier."""

    def pipelined_turn(self, worker: SimulatedWorker) -> None:
        if worker.core.fetched is None:
            self.send(worker, worker.core.pull(ahead=True))
        self.send(worker, self.make_push(worker, wants_view=False))
        if worker.batches:
            self.send(worker, worker.core.pull(ahead=True))


class Form(NamedTuple):
    """A way to compute while exchanging."""

    kind: type[Simulation]
    pipeline: bool
    own_push: bool  # add the worker's own push to the view while it is under way, if pushes move views

    def simulate(self, config: Config, run: Path) -> Summary:
        simulation = self.kind(config, run)
        for worker in simulation.workers:
            worker.core.push_moves_view &= self.own_push
        return simulation.run()


FORMS = {
    "plain": Form(Simulation, pipeline=False, own_push=True),
    "pipeline": Form(Simulation, pipeline=True, own_push=True),
    "pipeline, its own push left out": Form(Simulation, pipeline=True, own_push=False),
    "naive": Form(Naive, pipeline=True, own_push=False),
    "naive, its own push added": Form(Naive, pipeline=True, own_push=True),
}


def forms_of(algorithm: str) -> list[str]:
    """Return the names of the forms that differ from each other under this algorithm."""
    moves = find_algorithm(algorithm).rule().push_moves_view
    return [name for name in FORMS if moves or "own push" not in name]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for algorithm in options.algorithms:
        for workers in options.workers:
            for name in forms_of(algorithm):
                form = FORMS[name]
                sets = [*options.overrides, f"algorithm={algorithm}", f"workers={workers}"]
                sets += [f"pipeline={str(form.pipeline).lower()}", "schedule=round-robin"]
                runs = over_seeds(form.simulate, options.config, sets, options.seeds)
                yield (algorithm, str(workers), name, f"{runs[0]['mean_lag']:.2f}"), runs


def main() -> None:
    parser = make_parser(__doc__, seeds=3)
    parser.add_argument("--algorithms", nargs="+", default=["dana", "asgd"])
    torch.set_num_threads(1)
    print_table(("algorithm", "workers", "form", "mean lag"), rows(parser.parse_args()))


if __name__ == "__main__":
    main()
