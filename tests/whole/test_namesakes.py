"""Files in the working directory that have the names of modules that danaz imports are never run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import SMALL_SCRIPT

from launcher.start import FOLDER, module_command, search_path

ROOT = Path(__file__).parents[2]
DANAZ = Path(sys.executable).with_name("danaz")
BOMB = "raise SystemExit(f'{__file__} was imported')\n"
INSTALLED = {
    *("danaz", "launcher", "torch", "numpy", "yaml", "rich", "typer", "click", "zmq", "msgpack", "pydantic"),
    *("safetensors", "horovod", "sklearn", "torchvision", "matplotlib", "markdown_it", "pygments", "typing_extensions"),
}
SMALL = ["--set", "epochs=1", "--set", "lr_schedule.milestones=[]"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Make a working directory that has a namesake of every import."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in {*sys.stdlib_module_names, *INSTALLED}:
        (folder / f"{name}.py").write_text(BOMB)
    (tmp_path / "train.py").write_text(SMALL_SCRIPT)
    return folder


def danaz(folder: Path, *words: str, command: tuple[str, ...] = (str(DANAZ),), **env: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run([*command, *words], cwd=folder, env=environment, **pipes, check=False)  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stdout
    return str(ended.stdout)


CONFIG = str(ROOT / "configs/digits.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["launch", CONFIG, *SMALL, "--hosts", "localhost:2", "--out", "run"],
        ["launch", "--hosts", "localhost:1", "--out", "run", "--", sys.executable, "../train.py"],
        ["launch", CONFIG, *SMALL, "-a", "ssgd", "--collective", "torch", "--hosts", "localhost:2", "--out", "run"],
        ["simulate", CONFIG, *SMALL, "--out", "run"],
        ["compare", CONFIG, *SMALL, "--algorithms", "dana,asgd", "--workers", "2", "--out", "run"],
    ],
    ids=["a config", "a script", "ssgd", "simulate", "compare"],
)
def test_training_among_namesakes(here: Path, words: list[str]) -> None:
    danaz(here, *words)
    assert list((here / "run").rglob("summary.json")) or (here / "run" / "results.csv").exists()


@pytest.mark.slow
def test_the_doctor_among_namesakes(here: Path) -> None:
    assert "All hosts can take part." in danaz(here, "doctor", "--hosts", "localhost")


@pytest.mark.slow
def test_a_path_that_names_the_working_directory(here: Path) -> None:
    """Python itself runs namesakes of its own library there, but not namesakes of installed packages."""
    for name in sys.stdlib_module_names:
        (here / f"{name}.py").unlink()
    for entry in ("", ".", str(here)):
        command = tuple(module_command("danaz"))
        assert "doctor" in danaz(here, "--help", command=command, PYTHONPATH=f"/nowhere:{entry}")


@pytest.mark.slow
def test_python_m_danaz_among_namesakes(here: Path) -> None:
    """Python finds danaz itself there first, and all that it imports before danaz."""
    for name in {*sys.stdlib_module_names, "danaz"}:
        (here / f"{name}.py").unlink()
    danaz(here, "doctor", "--hosts", "localhost", command=(sys.executable, "-m", "danaz"))


@pytest.mark.slow
def test_what_is_named_on_purpose_is_found_there(tmp_path: Path) -> None:
    """The command, the server and the workers find a rule there; the workers find model and data."""
    (tmp_path / "my_rules.py").write_text("from danaz.rules import dana_zero\ndef my_dana(momentum=0.9):\n"
                                          "    return dana_zero(momentum)\n")  # fmt: skip
    (tmp_path / "beside.py").write_text("FEATURES = 2\n")
    (tmp_path / "mine.py").write_text(
        "import torch\nimport beside\n"
        "def data():\n"
        "    found = torch.utils.data.TensorDataset(torch.randn(32, beside.FEATURES), torch.arange(32) % 2)\n"
        "    found.num_classes = 2\n"
        "    return found, None\n"
        "def net(num_classes):\n"
        "    return torch.nn.Linear(beside.FEATURES, num_classes)\n"
    )
    (tmp_path / "mine.yaml").write_text("data: mine:data\nmodel: mine:net\nepochs: 1\nbatch_size: 8\nlr: 0.1\n")
    for command in (("launch", "--hosts", "localhost:1"), ("simulate", "--workers", "2")):
        out = tmp_path / command[0]
        danaz(tmp_path, *command, "mine.yaml", "--algorithm", "my_rules:my_dana", "--out", str(out))
        assert json.loads((out / "summary.json").read_text())["algorithm"] == "my_rules:my_dana"


def test_the_order_of_the_path() -> None:
    installed = str(Path(FOLDER).parent)
    assert search_path([FOLDER, "", "/b", "/a"], "/b") == ["/a", installed, "/b"]
    assert search_path([installed, "/a"], installed) == ["/a", installed], "danaz lies in the working directory"
