"""Advice in an error message can be typed: each option that it names exists for that command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shipped import CONFIGS
from typer.testing import CliRunner

from danaz.cli.main import app, known_options
from danaz.compare.live import in_words_of_compare

QUADRATIC, DEMO = str(CONFIGS / "quadratic.yaml"), str(CONFIGS / "demo.yaml")
MENTIONED = re.compile(r"`?danaz ([a-z]+)[^`]*?(--[a-z][a-z-]+)|(--[a-z][a-z-]+)")
LIVE = ("--live", "--collective", "torch")
OTHER_LR = ("--set", "lr=0.01")

WRONG = [
    ("simulate", "-a", "baseline", "-n", "2"),
    ("simulate", "-a", "danna"),
    ("simulate", "-n", "0"),
    ("simulate", "-n", "1000000"),
    ("simulate", "--schedule", "block-randm"),
    ("simulate", "--schedule", "constant:1,2"),
    ("simulate", "--schedule", "trace:none"),
    ("simulate", "--device", "tpu"),
    ("simulate", "--wire", "1bit"),
    ("simulate", "--wire-view", "onebit"),
    ("simulate", "--sync-period", "0"),
    ("simulate", "--sync-period", "2", "-a", "dana-ga"),
    ("simulate", "--pipeline", "-a", "ssgd"),
    ("simulate", "--wire", "bf16", "-a", "easgd"),
    ("simulate", "--set", "lr"),
    ("simulate", "--set", "hyperparameters={{x: 1}}"),
    ("simulate", "--set", "workload=null", "--set", "data=torchvision.CIFAR10", "--set", "model=torchvision.resnet18"),
    ("simulate", "--out", "{used}"),
    ("tune", "-a", "baseline", "-n", "2"),
    ("tune", "-n", "0"),
    ("tune", "--lr", "x"),
    ("tune", "--momentum", "2"),
    ("tune", "--out", "{used}"),
    ("tune", "--out", "{comparison}", *OTHER_LR),
    ("compare", "-a", "baseline", "--hosts", "localhost:4", "--workers-per-host", "4", *LIVE),
    ("compare", "-a", "easgd", "--hosts", "localhost:1", "--set", "wire=bf16", *LIVE),
    ("compare", "-a", "danna"),
    ("compare", "--live"),
    ("compare", "--set", "workers=4"),
    ("compare", "--out", "{used}"),
    ("compare", "--out", "{comparison}", *OTHER_LR),
    ("launch", "-a", "baseline", "--hosts", "localhost:2", "--workers-per-host", "2"),
    ("launch", "-a", "elastic", "--hosts", "localhost:2", "--workers-per-host", "2"),
    ("launch", "-a", "ssgd", "--invite", "1"),
    ("launch", "-a", "ssgd", "--on-worker-failure", "restart"),
    ("launch", "-a", "ssgd", "--server-shards", "2"),
    ("launch", "--server-shards", "2", "--record"),
    ("launch", "--server-host", "localhost,127.0.0.1"),
    ("launch", "--seed", "1"),
    ("launch", "--hosts", "localhost", "--hostfile", "hosts"),
    ("launch", "--out", "{used}"),
    ("launch", "--resume", "{used}"),
    ("launch", "--on-worker-failure", "weep"),
    ("launch", "--launcher", "rocket"),
]
OF_THEIR_OWN = [
    ("compare", DEMO, "--set", "workers=4"),
    ("compare", DEMO, "--algorithms", "dana"),
    ("doctor", "--hosts", "localhost", "--hostfile", "hosts"),
    ("doctor", "--launcher", "rocket"),
    ("doctor", "--include", "a", "--exclude", "b"),
    ("work",),
    ("work", "--join", "x"),
    ("work", "--join", "x", "--key", "none"),
    ("serve", "--run", "none", "--resume"),
    ("serve", "--run", "{used}", "--bind", "tcp://0.0.0.0:*"),
    ("serve", "--run", "{used}"),
    ("replay", "none"),
    ("speedup", "-n", "x"),
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    for name in ("DANAZ_CONFIG", "DANAZ_RUN", "DANAZ_SECRET_FD"):
        monkeypatch.delenv(name, raising=False)
    (used := tmp_path / "used").mkdir()
    (used / "config.yaml").touch()
    (used / "updates.jsonl").touch()
    (comparison := tmp_path / "comparison").mkdir()
    lines = Path(QUADRATIC).read_text()
    (comparison / "comparison.yaml").write_text("cells: []\nconfig:\n  name: x\n" + _indented(lines))
    return {"used": str(used), "comparison": str(comparison)}


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


@pytest.mark.parametrize("words", [(each[0], QUADRATIC, *each[1:]) for each in WRONG] + OF_THEIR_OWN, ids=" ".join)
def test_every_option_in_an_error_message_exists(words: tuple[str, ...], folders: dict[str, str]) -> None:
    said = CliRunner().invoke(app, [word.format(**folders) for word in words], obj=[])
    assert isinstance(said.exception, SystemExit), (said.exception, said.output)
    assert said.exit_code == 2, said.output
    for other, its_option, own in MENTIONED.findall(said.stderr):
        command, option = (other, its_option) if other else (words[0], own)
        assert option in known_options(command), f"danaz {command} has no {option}: {said.stderr}"


def test_the_message_about_an_algorithm_of_one_worker() -> None:
    said = CliRunner().invoke(app, ["simulate", QUADRATIC, "-a", "baseline", "-n", "2"])
    assert "baseline trains on 1 worker, 2 were asked for; use one worker, or another algorithm" in said.stderr


def test_a_comparison_says_which_options_are_those_of_launch() -> None:
    assert in_words_of_compare("use --collective torch") == "use --collective torch"
    assert "options of `danaz launch`" in in_words_of_compare("name another way with --interface b=NAME")
