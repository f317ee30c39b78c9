"""The simulator's step as a CUDA graph: the bookkeeping around a capture on any machine, the capture itself on a GPU.

Also the reader of batches, which fetches them on demand or reads them ahead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from danaz.run.config import load_config
from danaz.simulate import simulator
from danaz.simulate.batch_reader import BatchReader
from danaz.simulate.step import WARM_UP, EagerStep, GraphedStep, Work, make_step
from danaz.torch.data import Batching
from danaz.vectors.model import FlatModel
from danaz.workloads import build
from danaz.workloads.computing import place

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
CPU = torch.device("cpu")


class FakeGraphs:
    """Like a CUDA graph, a replay repeats the captured work on the same buffers and returns the same tensor."""

    def __init__(self) -> None:
        self.captures = self.replays = self.apart = 0

    def capture(self, work: Work) -> Work:
        self.captures += 1
        result = torch.empty(())

        def replay() -> Tensor:
            self.replays += 1
            return result.copy_(work())

        return replay

    def on_a_stream_apart(self, work: Work) -> Tensor:
        self.apart += 1
        return work()

    def step(self, eager: EagerStep) -> GraphedStep:
        return GraphedStep(eager, self.capture, self.on_a_stream_apart)


def simulate(run: Path, *changes: str) -> dict[str, Any]:
    config = load_config(DIGITS, ["workers=4", "epochs=2", "threads=1", "augment=true", "gap=off", *changes])
    return simulator.simulate(config, run)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_run_of_graphed_steps_is_the_eager_run_bit_for_bit(tmp_path, monkeypatch, channels_last):
    """The data are 1442 samples in batches of 32, so that two batches are short."""
    changes = [f"channels_last={channels_last}"]
    eager = simulate(tmp_path / "eager", *changes)
    graphs = FakeGraphs()
    monkeypatch.setattr(simulator, "make_step", graphs.step)
    graphed = simulate(tmp_path / "graphed", *changes)
    assert graphs.captures == 1
    assert graphs.apart == WARM_UP
    assert graphs.replays == graphed["updates"] - WARM_UP - 2
    for file in ("updates.jsonl", "parameters.safetensors"):
        assert (tmp_path / "eager" / file).read_bytes() == (tmp_path / "graphed" / file).read_bytes()
    assert graphed["test_error_percent"] == eager["test_error_percent"]


def test_a_short_batch_first_is_not_what_is_captured():
    config = load_config(DIGITS)
    graphs, step = FakeGraphs(), make_parts(config, CPU)
    graphed = graphs.step(step)
    images, labels = step.workload.train.__getitems__(range(32))
    for size in [5] * (WARM_UP + 1) + [32] * (WARM_UP + 1) + [5]:
        graphed(images[:size], labels[:size])
    assert (graphs.apart, graphs.captures, graphs.replays) == (WARM_UP, 1, 1)


def make_parts(config: Any, device: torch.device) -> EagerStep:
    workload = build(config).with_data_on(device)
    model = place(workload.model, config, device)
    return EagerStep(model, FlatModel(model), workload, config, device)


def test_without_a_gpu_the_step_is_eager():
    eager = make_parts(load_config(DIGITS), CPU)
    assert make_step(eager) is eager


class Movable:
    """A data set that knows its device."""

    def __init__(self, device: str = "nowhere"):
        self.device = str(device)

    def to(self, device: torch.device) -> Movable:
        return Movable(str(device))


def test_data_that_can_move_does():
    workload = build(load_config(DIGITS))
    fixed = [1, 2, 3]
    moved = type(workload)(workload.model, Movable(), fixed, workload.loss).with_data_on(torch.device("cuda", 1))
    assert moved.train.device == "cuda:1"
    assert moved.test is fixed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_on_a_gpu_the_graph_gives_the_eager_gradients():
    config = load_config(DIGITS, ["device=cuda"])
    eager, other = make_parts(config, torch.device("cuda")), make_parts(config, torch.device("cuda"))
    graphed = make_step(other)
    assert isinstance(graphed, GraphedStep)
    for batch in range(WARM_UP + 4):
        x, y = eager.workload.train.__getitems__(range(32 * batch, 32 * batch + (32 if batch != WARM_UP + 2 else 7)))
        losses = eager(x, y).item(), graphed(x, y).item()
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        torch.testing.assert_close(eager.flat.grads, other.flat.grads, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(eager.flat.buffers(), other.flat.buffers(), rtol=1e-4, atol=1e-5)


class Slow:
    """A data set that reads sample by sample, as one made of files does."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(index)), index


def test_batches_read_ahead_equal_those_fetched_on_demand():
    """Each batch is taken once, in any order."""
    batching = Batching(22, 5, seed=4)
    ahead, in_place = (BatchReader(Slow(), batching, epochs=2, processes=processes) for processes in (2, 0))
    for number in (2, 0, 1, 4, 3, 9, 5, 8, 7, 6):
        (x, y), (same_x, same_y) = ahead.take(number), in_place.take(number)
        assert y.tolist() == batching.indices(number).tolist()
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)


def test_a_run_that_reads_ahead_is_the_same_run(tmp_path):
    files = []
    for processes in (0, 1):
        run = tmp_path / str(processes)
        changes = ["algorithm=easgd", "workers=3", "epochs=1", "threads=1", f"num_workers={processes}"]
        simulator.simulate(load_config(DIGITS.with_name("quadratic.yaml"), changes), run)
        files.append((run / "updates.jsonl").read_bytes())
    assert files[0] == files[1] != b""
