"""A run on disk: config.yaml, updates.jsonl, summary.json, parameters.safetensors, logs/.

A file gets its name only when it is complete, so a kill at any moment leaves whole files only. The server writes the
journal and the results: see danaz.serving.journal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danaz.files.atomic import write_atomically
from danaz.files.plain_yaml import dump_yaml
from danaz.files.reading import read_json

CONFIG, UPDATES, SUMMARY, PARAMETERS = "config.yaml", "updates.jsonl", "summary.json", "parameters.safetensors"


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.yaml, the resolved configuration."""
    write_atomically(folder / CONFIG, dump_yaml(dict(settings)).encode())


def read_summary(folder: Path) -> dict[str, Any]:
    """Return summary.json of a finished run, as with_measured completes it. Raises UnreadableError."""
    return with_measured(read_json(folder / SUMMARY))


def with_measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary with the figures that a script measured on the trained model, if it reported some.

    These are the figures of the test set, whose names begin with ``test_``, and the training loss: the server's own
    figure, the mean of the workers' last losses, is only an estimate. In a folder of an earlier version, the reported
    figures already stand among the others.
    """
    reported = summary.get("reported", {})
    tests = {name: reported_number(reported, name, None) for name in reported if name.startswith("test_")}
    loss = reported_number(reported, "final_train_loss", summary.get("final_train_loss"))
    return {**tests, **summary, "final_train_loss": loss}


def reported_number(reported: Mapping[str, Any], name: str, otherwise: float | None) -> float | None:
    """Return a reported figure if it is a number or None, and ``otherwise`` if not."""
    value = reported.get(name, otherwise)
    return value if value is None or isinstance(value, (int, float)) else otherwise
