"""Copy what is worth keeping of a finished comparison into the repository: figures, curves and charts of every cell.

    python scripts/publish_results.py runs/compare-cifar10-small docs/results/cifar10-small

Journals and parameters are not copied. The copy is still a comparison's folder: given as --out, the same
`danaz compare` continues with the cells that are missing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from danaz.compare.index import CELLS, read_index, write_index
from danaz.report.curves import CURVES

KEPT = ("summary.json", CURVES)


def publish(comparison: Path, where: Path) -> int:
    """Copy the comparison to the folder ``where``. Returns the number of finished cells."""
    finished = sorted(path.parent for path in (comparison / CELLS).glob("*/summary.json"))
    for cell in finished:
        (where / CELLS / cell.name).mkdir(parents=True, exist_ok=True)
        for kept in filter(Path.exists, (cell / name for name in KEPT)):  # a published cell may lack curves
            shutil.copy(kept, where / CELLS / cell.name / kept.name)
    for path in (comparison / "results.csv", *comparison.glob("*.png")):
        shutil.copy(path, where / path.name)
    config, names = read_index(comparison)
    write_index(where, {**config, "data_dir": None}, names)  # data_dir is a path on one machine
    return len(finished)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{publish(Path(sys.argv[1]), Path(sys.argv[2]))} cells are in {sys.argv[2]}")
