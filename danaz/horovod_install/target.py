"""Find out what a build depends on: this Python, its torch, its Horovod and this machine."""

import importlib.metadata
import json
import os
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import Target

_COMPILER_MEMORY_BYTES = 2 * 2**30  # what one compiler needs for torch's headers, with a margin


@dataclass(frozen=True)
class InstalledHorovod:
    """The Horovod that is installed in this Python."""

    version: str  # "0.28.1+torch2.14.1.cu130.r1f0c22ab" if danaz built it
    built_for: str | None  # the torch it was compiled against: "2.14.1+cu130"; None if built without PyTorch


def installed_horovod() -> InstalledHorovod | None:
    """Return the installed Horovod, or None. It is not imported, because one built for another torch would crash.

    The version of torch comes from horovod/metadata.json, which Horovod's own build writes into every wheel. So it is
    also known for a Horovod that danaz did not build.
    """
    try:
        distribution = importlib.metadata.distribution("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None
    record = Path(str(distribution.locate_file("horovod/metadata.json")))
    frameworks = json.loads(record.read_text()) if record.is_file() else {}
    return InstalledHorovod(distribution.version, frameworks.get("pytorch"))


def installed_torch() -> str:
    """Return the full version of torch, such as "2.14.1+cu130". Raises HorovodError if torch cannot be imported."""
    try:
        import torch  # imported here, because it takes seconds that `--help` does not need
    except ImportError as error:
        raise HorovodError(
            f"torch cannot be imported ({error}). Horovod is compiled against it: install torch first."
        ) from error
    return str(torch.__version__)


def target_at_hand() -> Target:
    """Return the target of a build for this Python here. Raises HorovodError if torch cannot be imported."""
    version = installed_torch()
    import torch

    return Target(
        torch=version,
        cuda=torch.version.cuda,
        cuda_architectures=tuple(
            match[1] for name in torch.cuda.get_arch_list() if (match := re.fullmatch(r"sm_(\d+)", name))
        ),
        cpu_flags=_cpu_flags(),
        python_tag=f"cp{sys.version_info.major}{sys.version_info.minor}",
        platform=sysconfig.get_platform().replace("-", "_"),
        libc=" ".join(platform.libc_ver()),
    )


def nvidia_folder() -> Path:
    """Return site-packages/nvidia, where pip installs the CUDA libraries and tools that torch uses."""
    return Path(str(importlib.metadata.distribution("torch").locate_file("nvidia")))


def compile_jobs() -> int:
    """Return the number of compilers that this machine's cores and memory allow at a time."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory_bytes // _COMPILER_MEMORY_BYTES))


def _cpu_flags() -> frozenset[str]:
    """Return the processor's instruction sets, or none if /proc/cpuinfo has no "flags", as on Arm."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
