"""results.csv: one row per cell, for other tools."""

from __future__ import annotations

import csv
import io

from danaz.compare.results import TEST_ERROR, ComparisonOutcome, Setting

KEYS = (  # entries of summary.json, beside those of the test set
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


def results_csv(outcome: ComparisonOutcome) -> str:
    """Return the text of results.csv. ``status`` is ``finished``, or why a cell failed. Missing figures are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    tests = {key for result in outcome.results for key in result.summary if key.startswith("test_")}
    keys = (TEST_ERROR.key, *sorted(tests - {TEST_ERROR.key}), *KEYS)
    writer.writerow(("algorithm", *Setting._fields, "seed", "status", *keys, "folder"))
    for result in outcome.results:
        status = "finished" if result.failure is None else f"failed: {result.failure}"
        figures = [result.summary.get(key) for key in keys]
        place = result.folder.relative_to(outcome.folder)
        writer.writerow([result.algorithm, *result.setting, result.seed, status, *figures, place])
    return text.getvalue()
