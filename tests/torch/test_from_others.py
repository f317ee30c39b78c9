"""The changes on docs/from-horovod-ddp-accelerate.md: each script trains as it was, and as it becomes."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import horovod.torch as hvd
import live
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import danaz.torch as danaz

PAGE = (Path(__file__).parents[2] / "docs/from-horovod-ddp-accelerate.md").read_text()
LINES = 6  # that a user has to write
PRINTED = re.compile(r"accuracy on the training images ([\d.]+)%")
LEAST = 85.0  # per cent; an untrained model has 10


@dataclass(frozen=True)
class Change:
    """A change to a whole script: lines that stay ( ), that go (-), and that come (+)."""

    lines: tuple[str, ...]

    @property
    def before(self) -> str:
        return self._script("-")

    @property
    def after(self) -> str:
        return self._script("+")

    @property
    def written(self) -> list[str]:
        """The lines that a user has to write."""
        return [line[1:] for line in self.lines if line.startswith("+")]

    @property
    def library(self) -> str:
        [name] = re.findall(r"^(?:import|from) (horovod|torch\.distributed|accelerate)\b", self.before, re.MULTILINE)
        return name

    def _script(self, sign: str) -> str:
        return "".join(f"{line[1:]}\n" for line in self.lines if line[:1] in (" ", "", sign))


CHANGES = [Change(tuple(text.splitlines())) for text in re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S)]
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.library)


def test_the_page_has_a_script_of_each_library() -> None:
    assert [change.library for change in CHANGES] == ["horovod", *["torch.distributed"] * 2, "accelerate"]


@each_change
def test_a_user_writes_six_lines(change: Change) -> None:
    assert 0 < len(change.written) <= LINES
    assert not re.search(r"horovod|hvd|accelerator|\bdist\b|DistributedDataParallel|DistributedSampler", change.after)


def accuracy(printed: str) -> float:
    [found] = PRINTED.findall(printed)
    return float(found)


@each_change
@pytest.mark.usefixtures("alone")
def test_it_trains_alone_as_it_becomes(change: Change, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(change.after)
    runpy.run_path(str(script), run_name="__main__")
    assert accuracy(capsys.readouterr().out) > LEAST


@pytest.mark.slow
@each_change
def test_it_trains_as_it_was(change: Change, tmp_path: Path) -> None:
    if importlib.util.find_spec(change.library) is None:
        assert change.library == "accelerate", "danaz comes with the others"
        pytest.skip("accelerate is not installed")
    script = tmp_path / "train.py"
    script.write_text(change.before)
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = {**os.environ, **world, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert accuracy(done.stdout) > LEAST


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_trains_on_a_cluster_as_it_becomes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(CHANGES[0].after)
    run = live.launch(
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", "dana"),
        out=tmp_path / "run",
        script=[str(script)],
    )
    assert run.summary["complete"]
    printed = PRINTED.findall(run.output)
    assert len(printed) == 4, "every rank has the trained model"
    assert len(set(printed)) == 1
    assert float(printed[0]) > LEAST


@pytest.mark.usefixtures("alone")
def test_the_loop_around_a_lightning_module_trains() -> None:
    class MyModule(nn.Module):
        """What the loop needs of a LightningModule."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def train_dataloader(self) -> DataLoader:
            generator = torch.Generator().manual_seed(1)
            return DataLoader(TensorDataset(torch.randn(300, 3, generator=generator)), batch_size=20, shuffle=True)

        def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
            assert number < 15
            return (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    danaz.init()
    torch.manual_seed(0)
    [loop] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names = {"danaz": danaz, "MyModule": MyModule}
    exec(loop, names)
    torch.testing.assert_close(names["module"].layer.weight.detach(), torch.ones(1, 3), atol=1e-3, rtol=0)


def test_the_calls_of_the_table_are_there() -> None:
    calls = set(re.findall(r"`(?:\w+ = )?(hvd|danaz)\.(\w+)", PAGE))
    assert {"init", "rank", "size", "DistributedOptimizer"} <= {name for module, name in calls if module == "hvd"}
    modules = {"hvd": hvd, "danaz": danaz}
    assert not [f"{module}.{name}" for module, name in calls if not hasattr(modules[module], name)]
