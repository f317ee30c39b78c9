"""The scripts of examples/ train alone, as with plain `python`. tests/whole/test_live_examples.py launches them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import danaz.torch as danaz
from examples import EXAMPLES, FOLDER, Example

pytestmark = pytest.mark.usefixtures("alone")


def test_each_script_is_tried() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {example.script for example in EXAMPLES}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the script reports."""
    reported: dict[str, float] = {}
    monkeypatch.setattr(danaz, "report", reported.update)
    return reported


@pytest.mark.parametrize(
    "example", [pytest.param(each, id=each.script, marks=[pytest.mark.slow] * each.is_slow) for each in EXAMPLES]
)
def test_it_learns_alone(
    example: Example,
    figures: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example.path), *example.arguments])
    runpy.run_path(str(example.path), run_name="__main__")
    example.check(figures)
    printed = capsys.readouterr()
    assert printed.err == ""
    seen = float(re.findall(r"\d+\.\d+", printed.out)[-1])
    reported = figures[example.figure]
    assert seen == pytest.approx(100 - reported if "error" in example.figure else reported, abs=0.01)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".pt"}, "a process alone writes no run folder"


def test_a_frozen_backbone_stays_as_it_was(
    figures: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(FOLDER / "finetune.py"))
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--epochs", "2", "--frozen-epochs", "2"])
    models: list[torch.nn.Module] = []

    def accuracy_of(model: torch.nn.Module, data: object) -> float:
        models.append(model)
        return 0.0

    monkeypatch.setitem(script["main"].__globals__, "accuracy_of", accuracy_of)
    script["main"]()
    assert "645 parameters train" in capsys.readouterr().out
    expected = script["pretrained_backbone"]().state_dict()
    found = models[-1].get_submodule("0").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
