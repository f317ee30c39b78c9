"""What ``--pipeline`` costs in accuracy, beside the naive way to compute while exchanging, in simulated runs.

    python benchmarks/pipeline_accuracy.py configs/digits.yaml --workers 4 8 --seeds 3

Workers take turns, which fixes the lag. Errors are means over the seeds and, in brackets, their least and largest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from danaz.config import load_config
from danaz.rules import find_algorithm
from danaz.simulate.simulator import SimulatedWorker, Simulation


class Naive(Simulation):
    """Each batch on the answer to the push before the last, which was there a whole batch earlier."""

    def _turn_in_pipeline(self, worker: SimulatedWorker) -> None:
        if worker.core.fetched is None:
            self._say(worker, worker.core.pull(ahead=True))
        self._say(worker, self._push(worker, wants_view=False))
        if worker.batches:
            self._say(worker, worker.core.pull(ahead=True))


class Form(NamedTuple):
    """A way to compute while exchanging."""

    kind: type[Simulation]
    pipeline: bool
    own_push: bool  # whether the worker's push on its way is added, where pushes move views


FORMS = {
    "plain": Form(Simulation, pipeline=False, own_push=True),
    "pipeline": Form(Simulation, pipeline=True, own_push=True),
    "pipeline, its own push left out": Form(Simulation, pipeline=True, own_push=False),
    "naive": Form(Naive, pipeline=True, own_push=False),
    "naive, its own push added": Form(Naive, pipeline=True, own_push=True),
}


def forms_of(algorithm: str) -> list[str]:
    """Those that differ under this algorithm."""
    moves = find_algorithm(algorithm).rule().push_moves_view
    return [name for name in FORMS if moves or "own push" not in name]


def run(form: Form, config: str, overrides: list[str]) -> dict[str, Any]:
    sets = [*overrides, f"pipeline={str(form.pipeline).lower()}", "schedule=round-robin"]
    with tempfile.TemporaryDirectory() as folder:
        simulation = form.kind(load_config(config, sets), Path(folder))
        for worker in simulation.workers:
            worker.core.push_moves_view &= form.own_push
        return simulation.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--algorithms", nargs="+", default=["dana", "asgd"])
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| algorithm | workers | form | mean lag | test error % | mean gap |")
    print("| --- | --- | --- | --- | --- | --- |")
    for algorithm in options.algorithms:
        for workers in options.workers:
            for name in forms_of(algorithm):
                sets = [*options.overrides, f"algorithm={algorithm}", f"workers={workers}"]
                runs = [run(FORMS[name], options.config, [*sets, f"seed={seed}"]) for seed in range(options.seeds)]
                errors = [summary["test_error_percent"] for summary in runs]
                gaps = [summary["mean_gap"] for summary in runs if summary["mean_gap"] is not None]
                print(
                    f"| {algorithm} | {workers} | {name} | {runs[0]['mean_lag']:.2f} "
                    f"| {statistics.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f}) "
                    f"| {statistics.mean(gaps) if gaps else float('nan'):.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
