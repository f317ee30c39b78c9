"""Condense updates.jsonl into curves: training loss and gap over the epochs, and how often each lag occurred."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from danaz.compare.results import Result
from danaz.files.atomic import write_atomically
from danaz.files.reading import UnreadableError, read_json

MOST_POINTS = 100  # points of a curve at most; fewer if there are fewer epochs
LEAST_POINTS = 20
CURVES = "curves.json"  # kept beside updates.jsonl, which may hold a million lines


@dataclass(frozen=True)
class Curves:
    """The curves of one run. Each point is a mean over one of several equal parts of the run."""

    epochs: list[float]  # the middle of each part
    loss: list[float | None]  # None: no update of this part has a loss
    gap: list[float | None]  # None: no update of this part has a gap
    lags: list[tuple[int, int]]  # (lag, number of updates with it), sorted by lag


def read_curves(result: Result) -> Curves | None:
    """Return the curves of a finished run; None if it made no update. They are computed once, and kept beside the run.

    Raises UnreadableError for a damaged file, and OSError if the curves cannot be written.
    """
    cache = result.folder / CURVES
    if cache.exists():
        return _cached(cache)
    updates = result.folder / "updates.jsonl"
    if not updates.exists() or not result.summary.get("updates"):
        return None
    try:
        with updates.open() as lines:
            curves = make_curves(map(json.loads, lines), result.summary["updates"], result.summary["epochs"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableError(updates, f"one of its lines is not an update ({error!r})") from None
    except OSError as error:
        raise UnreadableError(updates, error.strerror) from None
    write_atomically(cache, json.dumps(asdict(curves)).encode())
    return curves


def _cached(path: Path) -> Curves:
    try:
        return Curves(**read_json(path))
    except TypeError as error:
        raise UnreadableError(
            path, f"it holds no curves ({error}); delete it, and the next report makes it again"
        ) from None


def make_curves(updates: Iterable[dict[str, Any]], count: int, epochs: float) -> Curves:
    """Condense ``count`` updates, spread evenly over ``epochs``. Figures that are not finite are left out."""
    parts = min(count, max(LEAST_POINTS, min(MOST_POINTS, round(epochs))))
    losses: list[list[float]] = [[] for _ in range(parts)]
    gaps: list[list[float]] = [[] for _ in range(parts)]
    lags: Counter[int] = Counter()
    for update in updates:
        part = min(parts - 1, (update["version"] - 1) * parts // count)
        for kept, value in ((losses, update["loss"]), (gaps, update["gap"])):
            if value is not None and isfinite(value):
                kept[part].append(value)
        lags[update["lag"]] += 1
    middles = [(part + 0.5) / parts * epochs for part in range(parts)]
    return Curves(middles, [_mean(part) for part in losses], [_mean(part) for part in gaps], sorted(lags.items()))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
