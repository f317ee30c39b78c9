"""How Horovod is built for a given torch: a pure function from the target to the environment of the build.

Horovod 0.28.1 (2023) is the newest release. It predates C++20, which torch's headers need today. Its sources stay as
released: a CMake toolchain file (in `toolchain/`) raises the standard and works around its gethostname() bug.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

HOROVOD_VERSION = "0.28.1"
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"  # of the sdist on PyPI
TOOLCHAIN = Path(__file__).with_name("toolchain")

# What Horovod imports. `horovodrun` needs setuptools for distutils, which Python 3.12 has removed.
RUN_REQUIREMENTS = ("cffi", "cloudpickle", "packaging", "psutil", "pyyaml", "setuptools")
# Installed next to torch and not into an isolated build environment, because the build must see this torch.
BUILD_REQUIREMENTS = ("cmake>=3.21", "wheel", *RUN_REQUIREMENTS)

# With HOROVOD_WITH_MPI or CUDA_HOME from the user's shell, the wheel would not be what its recipe describes.
_FOREIGN = re.compile(r"HOROVOD_|CMAKE_|(CUDA_HOME|CUDA_PATH|CUDACXX|CUDAToolkit_ROOT|MAKEFLAGS|MFLAGS)$")

_X86_FLAGS = ("avx", "f16c", "fma")  # the instructions that Horovod's half-precision sums use


@dataclass(frozen=True)
class Target:
    """What a wheel is built for. Equal targets can share one wheel."""

    torch: str  # full version: "2.14.1+cu130"
    cuda: str | None  # "13.0"; None for a CPU build of torch
    cuda_architectures: tuple[str, ...]  # compute capabilities that torch is compiled for: ("75", "80", ...)
    cpu_flags: frozenset[str]  # as in /proc/cpuinfo
    python_tag: str  # "cp311"
    platform: str  # "linux_x86_64"
    libc: str  # "glibc 2.36": a wheel does not run on an older one


@dataclass(frozen=True)
class CudaStage:
    """The folders of a CUDA toolkit, in the layout that nvcc, CMake and torch expect."""

    root: Path
    nccl_include: Path

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def lib(self) -> Path:
        return self.root / "lib64"


def settings(target: Target) -> dict[str, str]:
    """Return the choices of the build: all variables that shape the wheel and contain no path."""
    chosen = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_NVTX": "1",  # otherwise it depends on whether a toolkit is in /usr/local
        "HOROVOD_BUILD_ARCH_FLAGS": " ".join(f"-m{flag}" for flag in _X86_FLAGS if flag in target.cpu_flags),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # the bundled gloo asks for a version that CMake 4 no longer accepts
    }
    if target.cuda is not None:
        chosen |= {
            "HOROVOD_GPU": "CUDA",
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_LINK": "SHARED",  # the libnccl.so.2 that torch has loaded
        }
    if target.cuda_architectures:  # otherwise Horovod compiles for all that nvcc knows, which takes long
        chosen["HOROVOD_BUILD_CUDA_CC_LIST"] = ",".join(target.cuda_architectures)
    return chosen


def recipe_hash(target: Target) -> str:
    """Return a hash of everything that shapes the wheel (target, settings, toolchain files), as eight hex digits."""
    facts = asdict(target) | {"cpu_flags": sorted(target.cpu_flags.intersection(_X86_FLAGS))}
    toolchain = {path.name: path.read_text() for path in sorted(TOOLCHAIN.iterdir())}
    text = json.dumps([HOROVOD_VERSION, facts, settings(target), toolchain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def local_version(target: Target) -> str:
    """Return the part of the wheel's version after `+`, such as `torch2.14.1.cu130.r1f0c22ab`.

    It puts torch and recipe into the wheel's name, by which the cache finds it, and into its metadata, which pip
    reports. So there is no separate record that could be lost or out of date.
    """
    torch = re.sub(r"[^a-z0-9]+", ".", target.torch.lower())
    return f"torch{torch}.r{recipe_hash(target)}"


def full_version(target: Target) -> str:
    """Return the version of a Horovod built for this target, such as `0.28.1+torch2.14.1.cu130.r1f0c22ab`."""
    return f"{HOROVOD_VERSION}+{local_version(target)}"


def toolkit_requirement(torch_requires: Iterable[str]) -> str | None:
    """Return the pip requirement for the compiler and headers that match torch's CUDA libraries, if torch pins any.

    >>> toolkit_requirement(['filelock', 'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"'])
    'cuda-toolkit[nvcc,cccl]==13.0.3'
    """
    for requirement in torch_requires:
        if match := re.match(r"cuda-toolkit\[[^]]*]\s*==\s*([\w.]+)", requirement):
            return f"cuda-toolkit[nvcc,cccl]=={match[1]}"
    return None


def environment(
    target: Target, shell: Mapping[str, str], scripts: Path, jobs: int, stage: CudaStage | None = None
) -> dict[str, str]:
    """Return the whole environment of the build.

    Args:
        target: what Horovod is built for.
        shell: the caller's environment.
        scripts: the bin folder of the Python that has torch and cmake.
        jobs: the number of compilers at a time.
        stage: the CUDA toolkit, for a CUDA target only.

    Raises:
        ValueError: a CUDA target without stage, or a stage without CUDA target.
    """
    if (stage is None) != (target.cuda is None):
        raise ValueError(f"a CUDA stage belongs to a CUDA target: cuda={target.cuda}, stage={stage}")
    result = {name: value for name, value in shell.items() if not _FOREIGN.match(name)}
    result |= settings(target)
    path = [str(scripts), shell.get("PATH", "")]
    result |= {
        "HOROVOD_LOCAL_VERSION": local_version(target),
        "HOROVOD_CMAKE": str(scripts / "cmake"),
        "CMAKE_TOOLCHAIN_FILE": str(TOOLCHAIN / "horovod.cmake"),
        "MAKEFLAGS": f"-j{jobs}",
    }
    if stage is not None:
        path.insert(0, str(stage.bin))
        # With HOROVOD_CUDA_HOME alone, the build silently supports CPUs only: torch must find the toolkit too.
        result |= {
            "CUDA_HOME": str(stage.root),
            "CUDACXX": str(stage.bin / "nvcc"),
            "HOROVOD_CUDA_HOME": str(stage.root),
            "HOROVOD_NCCL_INCLUDE": str(stage.nccl_include),
            "HOROVOD_NCCL_LIB": str(stage.lib),
        }
    return result | {"PATH": ":".join(path)}
