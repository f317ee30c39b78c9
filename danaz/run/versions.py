"""Which versions of the software a process runs on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("danaz", "torch", "horovod", "pyzmq", "numpy")


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package, and of the CUDA that torch is built for; None: it has none."""
    import torch

    return {"python": platform.python_version(), **dict(zip(PACKAGES, map(_version, PACKAGES), strict=True))} | {
        "cuda": torch.version.cuda
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
