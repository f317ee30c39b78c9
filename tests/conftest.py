"""What the tests of all floors share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder with the real CIFAR-10: ``DANAZ_CIFAR10``, else beside the checkout; the test is skipped without."""
    folder = Path(os.environ.get("DANAZ_CIFAR10", Path(__file__).parents[2] / "shared/data/cifar10"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {folder}; DANAZ_CIFAR10 names the folder that holds cifar-10-batches-py")
    return folder
