"""If a file of a run or comparison is torn, empty or nonsense, one sentence names it and says what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import live
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from danaz.cli.main import app
from danaz.files.reading import UnreadableError, read_json, read_tensors, read_yaml

pytestmark = pytest.mark.timeout(300)

CONFIG = live.ROOT / "configs" / "quadratic.yaml"
DEEP = 20_000


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": torn,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00\x80" * 100),
    "nested": lambda path: path.write_text("[" * DEEP),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("1"),
    "other keys": lambda path: path.write_text('{"a": 1}'),
    "a folder": folder,
}


def check_named(path: Path, *words: str) -> None:
    """Check that the command ends with a short message about this file."""
    result = CliRunner().invoke(app, [*map(str, words)], obj=[])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert path.name in result.stderr
    assert len(result.stderr) < 3000


# ---- readers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("other keys",)])
@pytest.mark.parametrize("reader", [read_json, read_yaml, read_tensors])
def test_every_reader_names_the_file(reader: Callable[[Path], object], damage: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if reader is read_tensors:
        save_file({"a": torch.zeros(100)}, path)
    else:
        path.write_text('{"a": [1, 2]}')
    assert reader(path)
    DAMAGE[damage](path)
    with pytest.raises(UnreadableError, match=f"^{path} cannot be used: "):
        reader(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for reader in (read_json, read_yaml, read_tensors):
        with pytest.raises(UnreadableError, match="No such file or directory"):
            reader(tmp_path / "none")


# ---- commands ----------------------------------------------------------------------------------------------------


def danaz(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "danaz", *map(str, words)], cwd=live.ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("recorded") / "run"
    danaz("launch", CONFIG, "--record", "--set", "epochs=1", "--out", run)
    return run


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "c"
    danaz("compare", CONFIG, "-a", "dana", "-n", "2", "--set", "epochs=1", "--out", out)
    return out


@pytest.mark.slow
def test_replay_names_it(recorded: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["replay", str(recorded)]).exit_code == 0
    for name in ("recording.bin", "parameters.safetensors", "summary.json"):
        for number, damage in enumerate(DAMAGE.values()):
            run = tmp_path / f"{name}-{number}"
            shutil.copytree(recorded, run)
            damage(run / name)
            check_named(run / name, "replay", str(run))
            shutil.rmtree(run)


@pytest.mark.slow
def test_a_cut_recording_is_no_other_run(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, run := tmp_path / "run")
    torn(run / "recording.bin")
    said = CliRunner().invoke(app, ["replay", str(run)])
    assert said.exit_code == 2
    assert "is cut short: it holds" in " ".join(said.stderr.split())
    assert "DIFFERENT" not in said.output


@pytest.mark.slow
def test_resume_names_it(recorded: Path, tmp_path: Path) -> None:
    kinds = {**DAMAGE, "odd values": lambda path: path.write_text("{hosts: [1], variables: 7, workers: {}, seed: x}")}
    for name in ("config.yaml", "launch.yaml", "summary.json"):
        for number, damage in enumerate(kinds.values()):
            run = tmp_path / f"{name}-{number}"
            shutil.copytree(recorded, run)
            (run / "summary.json").write_text('{"complete": false}')
            damage(run / name)
            if (
                name == "summary.json"
                and (run / name).is_file()
                and (run / name).read_text(errors="replace")[:1] == "{"
            ):
                continue  # of a run that is not complete
            check_named(run / name, "launch", "--resume", str(run), "--dry-run")


@pytest.mark.slow
def test_compare_names_it(compared: Path, tmp_path: Path) -> None:
    words = ("compare", str(CONFIG), "-a", "dana", "-n", "2", "--set", "epochs=1", "--out")
    cell = "cells/dana-2-block-random-seed0"
    for name in ("comparison.yaml", f"{cell}/summary.json", f"{cell}/curves.json", f"{cell}/updates.jsonl"):
        for number, damage in enumerate(DAMAGE.values()):
            out = tmp_path / f"{Path(name).name}-{number}"
            shutil.copytree(compared, out)
            if name.endswith("jsonl"):
                (out / cell / "curves.json").unlink()
            damage(out / name)
            if name.endswith("jsonl") and (out / name).is_file() and not (out / name).stat().st_size:
                continue  # a run without updates
            check_named(out / name, *words, str(out))
            shutil.rmtree(out)


@pytest.mark.slow
def test_a_trace_names_it(compared: Path, tmp_path: Path) -> None:
    trace = tmp_path / "updates.jsonl"
    for damage in DAMAGE.values():
        shutil.copy(compared / "cells/dana-2-block-random-seed0/updates.jsonl", trace)
        damage(trace)
        words = ("simulate", str(CONFIG), "-n", "2", "--schedule", f"trace:{trace}", "--out", str(tmp_path / "run"))
        check_named(trace, *words)
        if trace.is_dir():
            trace.rmdir()
