"""What the optimizer does not hold is the same on all ranks of all workers, bit for bit."""

from __future__ import annotations

from pathlib import Path

import live
import pytest
import torch
from cluster import Cluster
from torch import nn

from danaz.protocol.messages import Fetched
from danaz.server.core import ServerCore
from danaz.vectors.untrained import Untrained
from danaz.worker.core import WorkerCore


class Mixed(nn.Module):
    """Frozen layers and buffers of several types, one of which no state dict holds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trained = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.low = nn.Parameter(torch.randn(5).bfloat16(), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.norm.num_batches_tracked.fill_(seed)
        self.register_buffer("mask", torch.randn(7) > 0)
        self.register_buffer("table", torch.randn(3).double(), persistent=False)
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0]))


def bits(model: nn.Module) -> dict[str, bytes]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in named}


def test_another_model_becomes_the_same_but_for_what_is_trained() -> None:
    source, other = Mixed(1), Mixed(2)
    trained = [*other.trained.parameters(), *other.norm.parameters()]
    before = bits(other)
    packed = Untrained(source, [*source.trained.parameters(), *source.norm.parameters()]).packed()
    Untrained(other, trained).load(packed)
    after, expected = bits(other), bits(source)
    for name in after:
        is_trained = name.startswith("trained") or name in ("norm.weight", "norm.bias")
        assert after[name] == (before if is_trained else expected)[name], name


def test_a_model_of_another_shape() -> None:
    with pytest.raises(ValueError, match="all workers must make the same model"):
        Untrained(nn.BatchNorm1d(3), []).load(Untrained(nn.BatchNorm1d(4), []).packed())


def test_a_model_that_is_all_trained() -> None:
    model = nn.Linear(2, 2)
    everything = Untrained(model, list(model.parameters()))
    assert everything.size == 0
    everything.load(everything.packed())


# ---- in a whole run -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz

danaz.init()
number = 10 * danaz.worker_id() + danaz.rank()
torch.manual_seed(number)  # as many scripts do, and none should
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
model[0].requires_grad_(False)
model[1].running_mean.fill_(number)
optimizer = danaz.DistributedOptimizer(torch.optim.SGD(model[2].parameters(), lr=0.01), model)
loader = DataLoader(TensorDataset(torch.randn(64, 3), torch.randn(64, 1)), batch_size=8)
for epoch in danaz.epochs(1):
    for x, y in danaz.shard(loader, epoch):
        path = Path(sys.argv[1], f"{danaz.worker_id()}.{danaz.rank()}")
        if not path.exists():
            torch.save(model.state_dict(), path)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
def test_all_ranks_begin_with_one_model_whatever_their_seeds(algorithm: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    live.launch(
        *("--hosts", "localhost:4", "--workers-per-host", "2", "-a", algorithm),
        out=tmp_path / "run",
        script=[str(script), str(tmp_path)],
    )
    states = [torch.load(path) for path in sorted(tmp_path.glob("[01].*"))]
    assert len(states) == 4
    for state in states[1:]:
        for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"):
            assert torch.equal(state[name], states[0][name]), name
    assert states[0]["1.running_mean"].tolist() == [0.0] * 4, "worker 0's first rank has the model that counts"


def test_a_guest_and_a_restarted_server_have_it_too() -> None:
    beside = torch.tensor([1.0, float("nan")])
    cluster = Cluster("dana", 1, torch.zeros(4))
    assert cluster.server.state.untrained.numel() == 0
    settings = cluster.settings
    core = WorkerCore(cluster.workers[0].role, settings.rule().worker_rule)
    server = ServerCore(settings)
    core.receive(server.handle(0, core.join(torch.zeros(4), beside), 0.0)[0][1])
    restored = ServerCore(settings)
    restored.restore(server.snapshot(), [], life=1, now=0.0)
    for each in (server, restored):
        assert bits_of(each.state.untrained) == bits_of(beside)
    [(_, reply)] = server.handle(0, core.fetch(), 1.0)
    assert isinstance(reply, Fetched)
    assert bits_of(reply.untrained) == bits_of(beside)


def bits_of(words: torch.Tensor) -> list[int]:
    return words.view(torch.int32).tolist()
