"""What the documentation shows works as shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import danaz.torch as danaz
from danaz.rules import ALGORITHMS

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    broken = [
        link for link in LINK.findall((ROOT / page).read_text()) if not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert not broken


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_algorithms_page_tells_of_every_algorithm(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs/algorithms.md").read_text()


def test_the_page_on_scripts_tells_of_every_function() -> None:
    page = (ROOT / "docs/your-script.md").read_text()
    for name in set(danaz.__all__) - {"metrics", "progress", "NotInitializedError"}:
        assert re.search(rf"\b{name}\b", page), name


def test_the_script_on_that_page_trains(tmp_path: Path) -> None:
    script = code_blocks("docs/your-script.md")[0]
    made = """
def make_model():
    return nn.Linear(3, 1)


train_set = torch.utils.data.TensorDataset(torch.randn(300, 3), torch.zeros(300, 1))
"""
    imports, rest = script.split("danaz.init()")
    (tmp_path / "train.py").write_text(f"{imports}{made}danaz.init(){rest}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=env, check=True, timeout=100)
    weight = torch.load(tmp_path / "model.pt")["weight"]
    assert weight.abs().max() < 0.5
