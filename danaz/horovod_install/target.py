"""Look at this Python, its torch, its Horovod and this machine: the facts that the recipe turns into a build."""

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

_COMPILER_MEMORY_BYTES = 2 * 2**30  # one compiler on torch's headers, with room to spare


@dataclass(frozen=True)
class InstalledHorovod:
    """The Horovod in this Python."""

    version: str  # "0.28.1+torch2.14.1.cu130.r1f0c22ab" when danaz built it
    built_for: str | None  # the torch it was compiled against: "2.14.1+cu130"; None when it was built without PyTorch


def installed_horovod() -> InstalledHorovod | None:
    """What is installed, without importing it: a Horovod built for another torch crashes on import.

    The torch it was built for is Horovod's own record: its CMake writes the torch it compiles against into
    horovod/metadata.json inside the wheel, so the record holds for a Horovod built by any means.
    """
    try:
        distribution = importlib.metadata.distribution("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None
    record = Path(str(distribution.locate_file("horovod/metadata.json")))
    frameworks = json.loads(record.read_text()) if record.is_file() else {}
    return InstalledHorovod(distribution.version, frameworks.get("pytorch"))


def installed_torch() -> str:
    """The full version of the torch at hand: "2.14.1+cu130". Raises HorovodError when it cannot be imported."""
    try:
        import torch  # takes seconds, and `--help` needs none of it
    except ImportError as error:
        raise HorovodError(
            f"torch cannot be imported ({error}). Horovod is compiled against it: install torch first."
        ) from error
    return str(torch.__version__)


def target_at_hand() -> Target:
    """The target of a build for this Python on this machine. Raises HorovodError when torch cannot be imported."""
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
    """site-packages/nvidia, beside torch: where pip puts the CUDA libraries and tools."""
    return Path(str(importlib.metadata.distribution("torch").locate_file("nvidia")))


def compile_jobs() -> int:
    """How many compilers fit on this machine's cores and memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory_bytes // _COMPILER_MEMORY_BYTES))


def _cpu_flags() -> frozenset[str]:
    """The processor's instruction sets; empty where /proc/cpuinfo lists none by that name (Arm)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
