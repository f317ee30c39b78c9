"""Ranks that share a batch do the same as one rank with all of it, in real Horovod and torch.distributed worlds."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import live
import pytest
import torch
from loops import BATCH, EPOCHS, SAMPLES, assert_same, make_net, train_with_torch, variations

from danaz.worker import group
from danaz.worker.group import CollectiveError, SoloGroup, choose_collective

RANKS = 3

# All variations share one launch: each is its own session in the same world.
SCRIPT = f"""
import atexit, os, sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import danaz.torch.session
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.session import Session
from danaz.run.settings import RankInfo, from_environment
from loops import make_data, make_net, variations

BATCH, EPOCHS = {BATCH}, {EPOCHS}
out = Path(sys.argv[1])
settings, place = from_environment()
ranks = danaz.torch.session.make_group(settings.collective)
danaz.torch.session.make_group = lambda collective: ranks
close, ranks.close = ranks.close, lambda: None  # the world outlives the sessions


class Noted(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path, self.data = path, make_data()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        with open(self.path, "a") as file:
            file.write(f"{{index}}\\n")
        return self.data[index]


def train(name, make, step, passes=1, channels_last=False, **options):
    session = Session(settings, place if name == "usual_step" else RankInfo())  # one of them writes the run folder
    atexit.unregister(session.close)
    model = make_net()
    if ranks.rank:
        torch.nn.init.ones_(model.last.weight)  # rank 0's parameters are everyone's
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = DistributedOptimizer(make(model), model, session.group, passes, replicated=True)
    session.adopt(optimizer)
    session.epochs = EPOCHS
    loader = DataLoader(Noted(out / f"{{name}}.{{ranks.rank}}"), batch_size=BATCH, shuffle=True, **options)
    without_gradient = 0
    for epoch in range(EPOCHS):
        for x, y in session.shard(loader, epoch):
            step(model, optimizer, x, y)
            without_gradient += not (x[:, 0, 0, 0] > 0).any()
            if channels_last:
                assert not model.convolution.weight.is_contiguous()
    session.finish()
    session.close()
    return model.state_dict(), without_gradient


results = {{name: train(name, **options) for name, options in variations().items()}}
results["name"] = ranks.name
torch.save(results, out / f"results.{{ranks.rank}}")
close()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("collective", ["horovod", "torch"])
def test_ranks_that_share_a_batch_equal_one_rank(collective: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    live.launch(
        *("--hosts", f"localhost:{RANKS}", "--algorithm", "ssgd", "--warmup-epochs", "0", "--collective", collective),
        out=tmp_path / "run",
        script=[str(script), str(tmp_path)],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    ranks = [torch.load(tmp_path / f"results.{rank}") for rank in range(RANKS)]
    assert [rank["name"] for rank in ranks] == [collective] * RANKS
    assert sum(rank["now and then"][1] for rank in ranks) > 0, "all ranks used all parameters: nothing was tested"
    for name, options in variations().items():
        first, *others = [rank[name][0] for rank in ranks]
        for state in others:
            assert all(torch.equal(tensor, first[key]) for key, tensor in state.items()), f"{name}: ranks differ"
        ours, theirs = make_net(), make_net()
        ours.load_state_dict(first)
        drop_last = bool(options.get("drop_last"))
        train_with_torch(theirs, options["make"], options["step"], drop_last)
        assert_same(ours, theirs, name=name)
        files = [tmp_path / f"{name}.{rank}" for rank in range(RANKS)]
        fetched = Counter(line for file in files for line in file.read_text().split())
        if drop_last:
            assert sum(fetched.values()) == EPOCHS * (SAMPLES // BATCH * BATCH), name
            assert max(fetched.values()) <= EPOCHS, name
        else:
            # The last batch has two samples for three ranks: the third rank computes on the first's, with weight zero.
            assert fetched.keys() == {str(sample) for sample in range(SAMPLES)}, name
            assert min(fetched.values()) >= EPOCHS, name
            assert sum(fetched.values()) == EPOCHS * (SAMPLES + 1), name


WAITING = """
import sys, time
from pathlib import Path

import torch

from danaz.run.milestones import MISSING, reach
from danaz.worker.group import make_group

ranks = make_group("horovod")
out, tensor = Path(sys.argv[1]), torch.ones(3)
for name in ("sum", "broadcast"):
    ranks.broadcast(ready=torch.zeros(1))
    if ranks.rank == 1 - (name == "broadcast"):
        time.sleep(2)  # the other rank waits
    began = time.thread_time()
    ranks.wait(ranks.sum_async(tensor, "late")) if name == "sum" else ranks.broadcast(late=tensor)
    (out / f"{name}.{ranks.rank}").write_text(str(time.thread_time() - began))
for milestone in MISSING:
    reach(milestone)  # otherwise the first rank to end would end the other
ranks.close()
"""


@pytest.mark.slow
def test_a_rank_that_waits_leaves_the_processor_to_others(tmp_path: Path) -> None:
    """The test measures the rank's own processor time, so that a busy machine cannot spoil it."""
    script = tmp_path / "script.py"
    script.write_text(WAITING)
    live.launch(
        *("--hosts", "localhost:2", "--algorithm", "ssgd"),
        out=tmp_path / "run",
        script=[str(script), str(tmp_path)],
        succeeds=False,  # because nothing is trained
    )
    assert float((tmp_path / "sum.0").read_text()) < 0.3
    assert float((tmp_path / "broadcast.1").read_text()) < 0.3


THREADS = """
import os, sys
from pathlib import Path

import torch

from danaz.worker.group import make_group

ranks = make_group("torch")
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([parameter], lr=0.1)
parameter.sum().backward()
ranks.wait(ranks.sum_async(parameter.grad, "sum"))
optimizer.step()
ranks.close()
names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
Path(sys.argv[1], f"threads.{ranks.rank}").write_text(" ".join(names))
"""


@pytest.mark.slow
def test_no_thread_of_a_world_outlives_it(tmp_path: Path) -> None:
    """A thread that outlived it would sometimes abort its process when the interpreter ends."""
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    options = ("--hosts", "localhost:2", "--algorithm", "ssgd", "--collective", "torch")
    live.launch(*options, out=tmp_path / "run", succeeds=False, script=[str(script), str(tmp_path)])
    for rank in range(2):
        assert "gloo" not in (tmp_path / f"threads.{rank}").read_text()


def test_a_process_alone_is_a_group() -> None:
    solo = SoloGroup()
    tensor = torch.ones(3)
    solo.wait(solo.sum_async(tensor, "ones"))
    solo.broadcast(tensor=tensor)
    assert tensor.tolist() == [1, 1, 1]
    assert (solo.rank, solo.size) == (0, 1)


@pytest.mark.parametrize(
    ("wanted", "installed", "chosen", "said"),
    [
        ("auto", True, "horovod", "Horovod"),
        ("horovod", True, "horovod", "Horovod"),
        ("auto", False, "torch", "because Horovod is not installed"),
        ("torch", True, "torch", "as asked for"),
    ],
)
def test_the_choice_of_a_collective_is_explained(
    wanted: str, installed: bool, chosen: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group.importlib.util, "find_spec", lambda name: object() if installed else None)
    name, sentence = choose_collective(wanted)
    assert name == chosen
    assert said in sentence


def test_horovod_is_wanted_but_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CollectiveError, match="danaz horovod install"):
        choose_collective("horovod")
