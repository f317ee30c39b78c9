"""Copy of a finished comparison what is worth keeping in the repository: figures, curves and charts of every cell.

    python scripts/publish_results.py runs/compare-cifar10-small docs/results/cifar10-small

Journals and parameters stay behind. What is published is a comparison's folder still: with it as --out, the same
`danaz compare` goes on with the cells that are missing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from danaz.compare.folder import CELLS, INDEX
from danaz.files.plain_yaml import dump_yaml
from danaz.files.reading import read_yaml
from danaz.report.curves import CACHE

KEPT = ("summary.json", CACHE)


def publish(comparison: Path, where: Path) -> int:
    """Returns the number of cells."""
    finished = sorted(path.parent for path in (comparison / CELLS).glob("*/summary.json"))
    for cell in finished:
        (where / CELLS / cell.name).mkdir(parents=True, exist_ok=True)
        for kept in filter(Path.exists, (cell / name for name in KEPT)):  # no curves of a cell that was published so
            shutil.copy(kept, where / CELLS / cell.name / kept.name)
    for path in (comparison / "results.csv", *comparison.glob("*.png")):
        shutil.copy(path, where / path.name)
    index = read_yaml(comparison / INDEX)
    index["config"]["data_dir"] = None  # a path of one machine
    (where / INDEX).write_text(dump_yaml(index))
    return len(finished)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{publish(Path(sys.argv[1]), Path(sys.argv[2]))} cells are in {sys.argv[2]}")
