"""Benchmarks run from beginning to end, at a size too small to measure anything."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from namespaces import missing
from shipped import CONFIGS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


SMALL = ("--device=cpu", "--model=small", "--batch=2", "--steps=3", "--warm-up=1", "--turns=1")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_step_is_measured_each_way():
    done = run("step_gpu.py", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    ways = re.findall(r"^(.+?) +(\d+\.\d+) ms a step", done.stdout, re.MULTILINE)
    assert [way for way, _ in ways] == ["alone", "danaz", "danaz --pipeline"]
    assert all(float(milliseconds) > 0 for _, milliseconds in ways)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
def test_shards_are_measured_behind_wires_of_their_own(tmp_path):
    table = tmp_path / "shards.csv"
    small = ("--shards=2", "--workers=2", "--megabytes=1.5", "--seconds=0.5", "--repetitions=1", f"--csv={table}")
    done = run("shards.py", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["workers"], row["shards"]) for row in rows] == [("2", "1"), ("2", "2")]
    assert all(float(row["exchanges_per_second"]) > 0 for row in rows)


@pytest.mark.timeout(300)  # on a busy machine, torch takes long to import
def test_the_step_is_measured_without_a_launcher(tmp_path):
    """Measure as the benchmark's processes do; danaz has a server of its own. Without a GPU, the benchmark says so.

    The processes run at once, because each imports torch.
    """
    figures = {way: tmp_path / f"{way}.json" for way in ("alone", "danaz")}
    with ThreadPoolExecutor() as threads:
        measured = [
            threads.submit(run, "step_gpu.py", "--way", way, "--figures", file, *SMALL) for way, file in figures.items()
        ]
        refused = [threads.submit(run, "step_gpu.py")] * (not torch.cuda.is_available())
    for done in (each.result() for each in measured):
        assert done.returncode == 0, done.stdout + done.stderr
    assert all(json.loads(file.read_text()) > 0 for file in figures.values())
    for done in (each.result() for each in refused):
        assert done.returncode == 1
        assert "no GPU here" in done.stderr


def test_it_is_resnet_50_that_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    with torch.device("meta"):
        model = importlib.import_module("step_gpu").resnet50()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032, "the number published for torchvision's ResNet-50"
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--profile",)])
def test_the_overhead_of_a_script_alone_is_measured(more):
    done = run("overhead.py", "--models", "gpt", "--seconds", "0.2", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    if more:
        assert "optimizer.py" in done.stdout
        return
    ratios = re.findall(r"x (\S+) \((\S+) to (\S+)\)", done.stdout)
    assert len(ratios) == 2, "of processor times and of wall times"
    for ratio, low, high in ratios:
        assert 0 < float(low) <= float(ratio) <= float(high)


def test_the_interval_of_a_median_holds_the_true_one_in_95_of_100_cases(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    interval = importlib.import_module("overhead").median_and_interval
    assert interval([3.0, 1.0, 2.0])[0] == 2
    generator = torch.Generator().manual_seed(0)
    found = [interval(torch.randn(60, generator=generator).tolist()) for _ in range(1000)]
    assert 0.93 < sum(low <= 0 <= high for _, low, high in found) / 1000 < 0.98


TINY = (CONFIGS / "digits.yaml", "--workers=2", "--seeds=2", "--set=epochs=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "told_apart", "rows"),
    [
        (
            "pipeline_accuracy.py",
            ("--algorithms", "asgd"),
            ("algorithm", "workers", "form", "mean lag"),
            ["plain", "pipeline", "naive"],
        ),
        (
            "codec_accuracy.py",
            ("--rows", "wire=fp32", "wire=topk:0.1,wire_view=bf16"),
            ("algorithm", "workers", "sent as", "push bytes", "view bytes"),
            ["wire fp32", "wire topk:0.1, wire_view bf16"],
        ),
    ],
)
def test_accuracy_is_a_row_for_each_way(script, arguments, told_apart, rows):
    done = run(script, *TINY, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    headings, _, *lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert headings == [*told_apart, "test error %", "mean gap"]
    assert [line[2] for line in lines] == rows
    for *_, error, gap in lines:
        mean, least, most = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", error).groups())
        assert 0 <= least <= mean <= most <= 100
        assert float(gap) > 0
