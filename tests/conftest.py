"""What the tests of all floors share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from namespaces import Namespaces, missing, namespaces

# No test asserts a time, and a busy machine takes its own.
settings.register_profile("danaz", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("danaz")


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder with the real CIFAR-10: ``DANAZ_CIFAR10``, else beside the checkout; the test is skipped without."""
    folder = Path(os.environ.get("DANAZ_CIFAR10", Path(__file__).parents[2] / "shared/data/cifar10"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {folder}; DANAZ_CIFAR10 names the folder that holds cifar-10-batches-py")
    return folder


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespaces]:
    """A launching machine and the machines a and b, joined by ssh; skipped where there can be none, but not in CI."""
    reason = missing()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(f"continuous integration must test clusters, but {reason}")
    if reason is not None:
        pytest.skip(reason)
    with namespaces(tmp_path_factory.mktemp("network"), ["a", "b"]) as made:
        yield made
