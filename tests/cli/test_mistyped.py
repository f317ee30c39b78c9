"""For a forgotten ``--``, or a config key given as an option, the message shows the whole line to type."""

from __future__ import annotations

import subprocess
import sys

import pytest

from danaz.cli.main import known_options
from danaz.cli.mistyped import advice

PYTHON = sys.executable  # a command that exists


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ("train.py --epochs 3", "-- python train.py --epochs 3"),
        ("train.py", "-- python train.py"),
        (f"--hosts localhost:2 {PYTHON} train.py", f"--hosts localhost:2 -- {PYTHON} train.py"),
        (f"-H a:4,b:4 {PYTHON} -u train.py --seed 1", f"-H a:4,b:4 -- {PYTHON} -u train.py --seed 1"),
        ("train.py --hosts localhost:2", "--hosts localhost:2 -- python train.py"),
        ("train.py --hosts=localhost:2 --epochs 3", "-- python train.py --hosts=localhost:2 --epochs 3"),
        ("--no-pipeline --record ./run.sh 1", "--no-pipeline --record -- ./run.sh 1"),
        ("train.py -- --epochs 3", "-- python train.py --epochs 3"),
        ("--server-shards 2 --out runs/a train.py data", "--server-shards 2 --out runs/a -- python train.py data"),
    ],
)
def test_a_forgotten_double_dash(words: str, typed: str) -> None:
    before, _, after = words.partition(" -- ")
    said = advice("launch", before.split(), after.split(), known_options("launch"))
    assert said is not None
    assert said.endswith(f"Type: danaz launch {typed}")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("launch", "configs/digits.yaml --hosts a:4"),
        ("launch", f"--remote-python {PYTHON} configs/digits.yaml"),
        ("launch", f"--out train.py --chdir {PYTHON} configs/digits.yml"),
        ("launch", "--resume runs/a"),
        ("launch", "--bogus"),
        ("launch", ""),
        ("simulate", "configs/digits.yaml -n 4"),
        ("replay", "train.py"),
        ("doctor", "--epochs 3"),
        ("nonsense", "--epochs 3"),
    ],
)
def test_other_lines_get_no_advice(command: str, words: str) -> None:
    assert advice(command, words.split(), [], known_options(command)) is None


@pytest.mark.parametrize(
    ("command", "words", "typed"),
    [
        ("launch", "a.yaml --epochs 3", "--set epochs=3"),
        ("simulate", "a.yaml --weight-decay=1e-4", "--set weight_decay=1e-4"),
        ("compare", "--lr --fresh a.yaml", "--set lr=…"),
        ("tune", "a.yaml --batch-size", "--set batch_size=…"),
    ],
)
def test_a_key_of_the_config_as_an_option(command: str, words: str, typed: str) -> None:
    said = advice(command, words.split(), [], known_options(command))
    assert said is not None
    assert said.endswith(f"type: {typed}")


def test_the_command_gives_its_advice_in_one_line_and_ends() -> None:
    words = [sys.executable, "-m", "danaz", "launch", "train.py", "--epochs", "3"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("Type: danaz launch -- python train.py --epochs 3")
    assert len(ended.stderr.strip().splitlines()) == 1
