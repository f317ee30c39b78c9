"""Reports on comparisons with made-up figures, for which the right tables and charts are known."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from shipped import shipped

from danaz.cli.output import print_comparison
from danaz.compare.results import Result, Setting, group, read_outcome
from danaz.compare.tables import comparison_rows
from danaz.report.comparison import write_report
from danaz.report.curves import make_curves, read_curves
from danaz.report.markdown import experiment
from danaz.report.matrix import matrices
from danaz.report.paper import DANA, GAP_AWARE, papers_of
from danaz.report.plot_data import collect
from danaz.report.plot_final import draw_by_time
from danaz.report.results_csv import results_csv
from danaz.report.style import looks
from danaz.run.units import duration

UPDATES = 60


class MadeUp:
    """The folder of a comparison, to which a test adds the cells that it needs."""

    def __init__(self, path: Path, config: str = "digits"):
        self.path = path
        self.config = shipped(config).model_dump(mode="json")
        self.names: list[str] = []

    def add(self, algorithm: str, workers: int, error: float | None, seed: int = 0, **more) -> None:
        schedule = more.pop("schedule", "block-random")
        name = f"{algorithm}-{workers}-{schedule}-seed{seed}"
        summary = {
            "algorithm": algorithm,
            "workers": workers,
            "ranks_per_worker": 1,
            "schedule": schedule,
            "seed": seed,
            "updates": UPDATES,
            "epochs": 20.0,
            "test_error_percent": error,
            "final_train_loss": 0.25,
            "mean_lag": workers - 1.0,
            "mean_gap": 0.5,
            "images_per_second": 1234.0,
            "wall_seconds": 9.0,
            "diverged": False,
            **more,
        }
        folder = self.path / "cells" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
        lines = [
            {"version": v, "lag": (v + workers) % workers, "loss": 2.0 / v, "gap": 0.1 * workers if v % 2 else None}
            for v in range(1, UPDATES + 1)
        ]
        (folder / "updates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.names.append(name)

    def read(self, *failed: Result):
        index = {"config": self.config, "cells": [*self.names, *(result.folder.name for result in failed)]}
        (self.path / "comparison.yaml").write_text(yaml.safe_dump(index))
        return read_outcome(self.path, failed)

    def failed(self, algorithm: str, workers: int, why: str) -> Result:
        how = {"workers": workers, "ranks_per_worker": 1, "schedule": "block-random", "seed": 0}
        return Result.of({"algorithm": algorithm, **how}, self.path / "cells" / f"{algorithm}-{workers}", failure=why)


@pytest.fixture
def made(tmp_path):
    return MadeUp(tmp_path)


def rows_of(outcome):
    titles, rows = comparison_rows(outcome)
    return [dict(zip(titles, row, strict=True)) for row in rows]


# ---- tables ------------------------------------------------------------------------------------------------------


def test_seeds_become_mean_and_standard_deviation(made):
    for seed, error in enumerate((1.0, 2.0, 3.0)):
        made.add("dana", 8, error, seed)
    [row] = rows_of(made.read())
    assert row["test accuracy %"] == "98.00 ± 1.00"
    assert row["mean lag"] == "7.00"
    assert row["run as"] == "simulated 8, block-random"
    assert row["remark"] == "3 seeds"


def test_one_seed_has_no_standard_deviation(made):
    made.add("dana", 4, 1.5, schedule="live")
    [row] = rows_of(made.read())
    assert row["test accuracy %"] == "98.50"
    assert row["run as"] == "live 4×1"
    assert row["remark"] == ""


def test_a_row_says_how_many_diverged_and_failed(made):
    made.add("asgd", 8, 90.0, seed=0, diverged=True)
    made.add("asgd", 8, None, seed=1, diverged=True)
    outcome = made.read(made.failed("asgd", 8, "out of paper"), made.failed("dana", 8, "out of ink"))
    asgd, dana = rows_of(outcome)
    assert asgd["test accuracy %"] == "10.00"
    assert asgd["remark"] == "2 seeds, diverged 2 of 3, FAILED 1 of 3"
    assert dana["test accuracy %"] == "–"
    assert dana["remark"] == "FAILED"


def test_without_classes_the_training_loss_is_the_measure(made):
    made.add("dana", 4, None)
    made.add("dana", 4, None, seed=1, final_train_loss=0.75)
    [row] = rows_of(made.read())
    assert "test accuracy %" not in row
    assert row["train loss"] == "0.5000 ± 0.3536"


def test_without_classes_a_test_set_gives_the_measure(made):
    made.add("dana", 4, None, reported={"test_loss": 0.125})
    [row] = rows_of(made.read())
    assert row["test loss"] == "0.1250"


def test_a_loss_in_bits_is_the_measure_although_there_is_an_error(made):
    for seed, bits in enumerate((2.0, 3.0)):
        for workers in (4, 8):
            made.add("dana", workers, 50.0, seed, reported={"test_bits_per_character": bits, "test_loss": 1.5})
    outcome = made.read()
    row, _ = rows_of(outcome)
    assert row["test bits per character"] == "2.500 ± 0.707"
    assert row["test accuracy %"] == "50.00"
    [matrix] = matrices(outcome)
    assert matrix.title == "Test bits per character, block-random"
    assert ["8", "2.500 ± 0.707"] in matrix.rows
    first, *_ = csv.DictReader(results_csv(outcome).splitlines())
    assert (first["test_bits_per_character"], first["test_error_percent"]) == ("2.0", "50.0")


def test_a_report_names_the_optimizer_with_its_options(made):
    made.add("dana", 8, 2.0)
    outcome = made.read()
    assert "sgd with momentum 0.9" in experiment(outcome)
    made.config |= {"optimizer": "adamw", "optimizer_options": {"betas": [0.9, 0.99]}}
    assert "adamw with betas [0.9, 0.99]" in experiment(made.read())
    del made.config["optimizer"], made.config["optimizer_options"]
    assert "sgd with momentum 0.9" in experiment(made.read()), "an earlier version knew no other optimizer"


def test_the_terminal_shows_every_row_and_where_the_logs_of_a_failure_are(made, capsys):
    made.add("dana", 8, 2.0)
    print_comparison(made.read(made.failed("asgd", 8, "ValueError: out of [bold] paper")))
    text = capsys.readouterr().out
    assert "98.00" in text
    assert "ValueError: out of [bold] paper" in text
    assert str(made.path / "cells" / "asgd-8" / "logs") in text
    assert "\x1b" not in text


def test_cells_that_were_not_run_are_pending(made):
    made.add("dana", 8, 2.0)
    made.names.append("dana-16")
    assert made.read().pending == ["dana-16"]


def test_matrix_has_a_row_for_each_number_of_workers_below_the_baseline(made):
    made.add("baseline", 1, 1.0)
    made.add("dana", 8, 2.0)
    made.add("dana", 4, 1.5)
    made.add("asgd", 8, 40.0, diverged=True)
    [matrix] = matrices(made.read())
    assert matrix.header == ["workers", "dana", "asgd"]
    assert matrix.rows == [["1 (baseline)", "1.00", "1.00"], ["4", "1.50", ""], ["8", "2.00", "40.00 diverged"]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.44, "5.4 s"), (59.99, "60.0 s"), (190, "3 min 10 s"), (7500.4, "2 h 5 min")]
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


# ---- the papers' figures -----------------------------------------------------------------------------------------


def test_papers_belong_only_to_their_own_experiment(tmp_path):
    theirs = shipped("cifar10-resnet20").model_dump(mode="json")
    assert papers_of(theirs) == [DANA, GAP_AWARE]
    assert papers_of({**theirs, "epochs": 10}) == []
    assert papers_of({**theirs, "lr_schedule": {**theirs["lr_schedule"], "milestones": [80]}}) == []
    assert papers_of(shipped("digits").model_dump(mode="json")) == []


def test_the_papers_figures_belong_to_their_schedule():
    assert DANA.error("nag-asgd", Setting(16, 1, "block-random")) == 50.5
    assert DANA.error("nag-asgd", Setting(16, 1, "gamma")) is None
    assert GAP_AWARE.error("dana-ga", Setting(32, 1, "gamma")) == 8.85
    assert DANA.error("dana", Setting(1, 1, "block-random")) == 8.37
    assert DANA.error("dana", Setting(16, 1, "live")) is None


def test_the_papers_row_stands_below_ours(tmp_path):
    made = MadeUp(tmp_path, "cifar10-resnet20")
    made.add("dana", 16, 8.9)
    made.add("dana-ga", 16, 8.8)
    [matrix] = matrices(made.read())
    assert matrix.rows == [["16", "8.90", "8.80"], ["DANA paper (mean of 5)", "8.76", ""]]


# ---- curves ------------------------------------------------------------------------------------------------------


def test_curves_are_means_over_equal_parts():
    updates = [{"version": v, "lag": v % 3, "loss": float(v), "gap": 1.0 if v <= 50 else None} for v in range(1, 101)]
    curves = make_curves(updates, count=100, epochs=40.0)
    assert len(curves.epochs) == 40
    assert curves.epochs[0] == 0.5
    assert curves.loss[0] == pytest.approx((1 + 2 + 3) / 3)  # versions 1, 2 and 3 lie in the first 40th of 100
    assert curves.gap[-1] is None
    assert curves.lags == [(0, 33), (1, 34), (2, 33)]


def test_a_figure_that_is_not_finite_is_left_out():
    updates = [{"version": v, "lag": 0, "loss": float("nan") if v == 1 else 3.0, "gap": None} for v in (1, 2)]
    curves = make_curves(updates, count=2, epochs=1.0)
    assert curves.loss == [None, 3.0]


def test_curves_are_computed_once(made):
    made.add("dana", 4, 1.0)
    [result] = made.read().results
    curves = read_curves(result)
    (result.folder / "updates.jsonl").unlink()
    again = read_curves(result)
    assert again.loss == curves.loss
    assert [tuple(pair) for pair in again.lags] == curves.lags


# ---- files -------------------------------------------------------------------------------------------------------


def a_grid(made: MadeUp, numbers=(4, 8)) -> None:
    made.add("baseline", 1, 1.0)
    for workers in numbers:
        for algorithm in ("dana", "nag-asgd"):
            for seed in (0, 1):
                made.add(algorithm, workers, 1.5 + seed if algorithm == "dana" else 40.0 + seed, seed)


def test_report_has_all_its_files_and_none_is_empty(made):
    a_grid(made)
    files = {file.name: file for file in write_report(made.read())}
    charts = {"error-by-workers", "loss-by-epoch", "gap-by-epoch", "lag"}
    assert set(files) == {"report.html", "report.md", "results.csv"} | {
        f"{name}.{kind}" for name in charts for kind in ("png", "svg")
    }
    for name in charts:
        assert files[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert files[f"{name}.png"].stat().st_size > 10_000
        assert "<svg" in files[f"{name}.svg"].read_text()


def test_one_number_of_workers_is_drawn_by_cell(made):
    a_grid(made, numbers=(8,))
    made.add("ssgd", 4, 2.0, schedule="live")
    names = [file.name for file in write_report(made.read())]
    assert {"error-by-cell.png", "error-by-time.png"} <= set(names)
    assert "error-by-workers.png" not in names


def test_error_against_wall_time_is_of_live_runs_alone(made):
    """Each setting has a panel and each algorithm a point: seconds on the x axis, error on the y axis."""
    a_grid(made)
    assert draw_by_time(collect(made.read())) is None
    made.add("ssgd", 4, 2.0, schedule="live", wall_seconds=30.0)
    made.add("dana", 4, 3.0, schedule="live", wall_seconds=10.0)
    made.add("dana", 2, None, schedule="live", wall_seconds=5.0)
    figure = draw_by_time(collect(made.read()))
    points = {
        (axes.get_title(), container.get_label()): tuple(float(v) for v in container.lines[0].get_xydata()[0])
        for axes in figure.axes
        for container in axes.containers
    }
    panel = "live: 4 workers × 1 rank"
    assert points == {(panel, "ssgd"): (30.0, 2.0), (panel, "dana"): (10.0, 3.0)}


def test_others_share_the_colours_of_favourites_last():
    seen = looks(["dana", *(f"algorithm-{number}" for number in range(6))])
    colours = [look.color for look in seen.values()]
    assert colours.index(colours[0], 1) == 6


def test_a_comparison_that_only_diverged_has_a_report(made):
    made.add("asgd", 8, None, diverged=True, final_train_loss=None, mean_gap=None, updates=0, epochs=0.0)
    assert {file.name for file in write_report(made.read())} >= {"report.html", "results.csv"}


def test_csv_has_a_row_a_cell(made):
    made.add("dana", 8, 2.0)
    made.add("dana", 8, 3.0, seed=1)
    write_report(made.read(made.failed("asgd", 8, "no, thanks")))
    with (made.path / "results.csv").open() as file:
        first, second, failed = csv.DictReader(file)
    what = ("algorithm", "workers", "schedule", "seed")
    assert [first[key] for key in what] == ["dana", "8", "block-random", "0"]
    assert (first["test_error_percent"], second["test_error_percent"]) == ("2.0", "3.0")
    assert first["status"] == "finished"
    assert first["folder"] == "cells/dana-8-block-random-seed0"
    assert failed["status"] == "failed: no, thanks"
    assert failed["test_error_percent"] == ""


def test_markdown_shows_the_charts_that_lie_beside_it(made):
    a_grid(made)
    write_report(made.read())
    text = (made.path / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 4
    assert all((made.path / picture).exists() for picture in pictures)
    assert "| 8 | 2.00 ± 0.71 | 40.50 ± 0.71 |" in text


class Tags(HTMLParser):
    """Checks that elements are closed in order, and records what the page would load."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_sound_file_that_needs_no_other(made):
    a_grid(made)
    write_report(made.read(made.failed("<script>", 8, "a <b> failed")))
    text = (made.path / "report.html").read_text()
    page = Tags()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.fetched == []
    assert page.seen.count("svg") == 4
    assert "script" not in page.seen
    assert "http" not in text
    assert "url(http" not in text
    assert "40.50 ± 0.71" in text


def test_charts_of_one_page_do_not_share_the_ids_they_refer_to(made):
    a_grid(made)
    write_report(made.read())
    page = (made.path / "report.html").read_text()
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clips) == len(set(clips)) > 0


def test_every_algorithm_looks_different_and_dana_the_same_everywhere():
    names = [f"algorithm-{number}" for number in range(11)]
    seen = looks([*names, "dana"])
    assert len(set(seen.values())) == 12
    assert seen["dana"] == looks(["ssgd", "dana"])["dana"]


def test_a_long_schedule_is_shown_by_its_end():
    assert Setting(4, 1, "trace:/a/very/long/way/down/to/run-7").label == "simulated 4, trace:…ay/down/to/run-7"
    assert Setting(2, 1, "constant:1,2.5").title == "2 simulated workers, constant:1,2.5"


def test_groups_keep_settings_together(made):
    for algorithm in ("dana", "asgd"):
        for workers in (4, 8):
            made.add(algorithm, workers, 1.0)
    assert [(each.setting.workers, each.algorithm) for each in group(made.read().results)] == [
        (4, "dana"),
        (4, "asgd"),
        (8, "dana"),
        (8, "asgd"),
    ]
