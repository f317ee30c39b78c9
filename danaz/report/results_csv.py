"""results.csv: one row per cell, for other tools."""

from __future__ import annotations

import csv
import io

from danaz.compare.results import ComparisonOutcome

KEYS = (  # entries of summary.json
    "test_error_percent",
    "final_train_loss",
    "diverged",
    "updates",
    "epochs",
    "mean_lag",
    "mean_gap",
    "gap_of",
    "images_per_second",
    "updates_per_second",
    "wall_seconds",
    "params_l2",
    "collective",
)
COLUMNS = ("algorithm", "workers", "ranks_per_worker", "schedule", "seed", "status", *KEYS, "folder")


def results_csv(outcome: ComparisonOutcome) -> str:
    """Return the text of results.csv. ``status`` is ``finished``, or why a cell failed. Missing figures are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in outcome.results:
        status = "finished" if result.failure is None else f"failed: {result.failure}"
        figures = [result.summary.get(key) for key in KEYS]
        place = result.folder.relative_to(outcome.folder)
        writer.writerow([result.algorithm, *result.setting, result.seed, status, *figures, place])
    return text.getvalue()
