"""How Horovod is built for one torch: a pure function from the target to the environment of the build.

Horovod 0.28.1 (2023) is the newest release and predates C++20, which torch's headers need today. Nothing in its sources
is changed: a CMake toolchain file (`toolchain/`) raises the standard and cures its gethostname() bug from outside.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

HOROVOD_VERSION = "0.28.1"
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"  # of its sdist on PyPI
TOOLCHAIN = Path(__file__).with_name("toolchain")

# Horovod's own imports; setuptools because `horovodrun` uses distutils, which left Python in 3.12.
RUN_REQUIREMENTS = ("cffi", "cloudpickle", "packaging", "psutil", "pyyaml", "setuptools")
# Installed beside torch and not into an isolated build environment, because the build must see that torch.
BUILD_REQUIREMENTS = ("cmake>=3.21", "wheel", *RUN_REQUIREMENTS)

# A stray HOROVOD_WITH_MPI or CUDA_HOME of the user's shell would make a wheel that its recipe does not describe.
_FOREIGN = re.compile(r"HOROVOD_|CMAKE_|(CUDA_HOME|CUDA_PATH|CUDACXX|CUDAToolkit_ROOT|MAKEFLAGS|MFLAGS)$")

_X86_FLAGS = ("avx", "f16c", "fma")  # what Horovod's half-precision sums are written with


@dataclass(frozen=True)
class Target:
    """What a wheel is built for. Two equal targets may share one wheel."""

    torch: str  # full version: "2.14.1+cu130"
    cuda: str | None  # "13.0"; None for a CPU build of torch
    cuda_architectures: tuple[str, ...]  # compute capabilities torch itself is compiled for: ("75", "80", ...)
    cpu_flags: frozenset[str]  # as in /proc/cpuinfo
    python_tag: str  # "cp311"
    platform: str  # "linux_x86_64"
    libc: str  # "glibc 2.36": a wheel does not run on an older one


@dataclass(frozen=True)
class CudaStage:
    """Folders of a CUDA toolkit in the layout that nvcc, CMake and torch expect."""

    root: Path
    nccl_include: Path

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def lib(self) -> Path:
        return self.root / "lib64"


def settings(target: Target) -> dict[str, str]:
    """The choices of the build: every variable that shapes the wheel and holds no path."""
    chosen = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_NVTX": "1",  # else it depends on what toolkit happens to lie in /usr/local
        "HOROVOD_BUILD_ARCH_FLAGS": " ".join(f"-m{flag}" for flag in _X86_FLAGS if flag in target.cpu_flags),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # the bundled gloo asks for less than CMake 4 accepts
    }
    if target.cuda is not None:
        chosen |= {
            "HOROVOD_GPU": "CUDA",
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_LINK": "SHARED",  # the libnccl.so.2 which torch has loaded already
        }
    if target.cuda_architectures:  # else Horovod compiles for all that nvcc knows, which takes long
        chosen["HOROVOD_BUILD_CUDA_CC_LIST"] = ",".join(target.cuda_architectures)
    return chosen


def recipe_hash(target: Target) -> str:
    """Eight hex digits over everything that shapes the wheel: target, settings and toolchain files."""
    facts = asdict(target) | {"cpu_flags": sorted(target.cpu_flags.intersection(_X86_FLAGS))}
    toolchain = {path.name: path.read_text() for path in sorted(TOOLCHAIN.iterdir())}
    text = json.dumps([HOROVOD_VERSION, facts, settings(target), toolchain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def local_version(target: Target) -> str:
    """The part behind `+` of the wheel's version, such as `torch2.14.1.cu130.r1f0c22ab`.

    So torch and recipe stand in the wheel's name, where the cache finds them, and in its metadata, where pip reports
    them: no record beside the wheel that could be lost or go out of step.
    """
    torch = re.sub(r"[^a-z0-9]+", ".", target.torch.lower())
    return f"torch{torch}.r{recipe_hash(target)}"


def full_version(target: Target) -> str:
    """`0.28.1+torch2.14.1.cu130.r1f0c22ab`: what an installed Horovod of this recipe calls itself."""
    return f"{HOROVOD_VERSION}+{local_version(target)}"


def toolkit_requirement(torch_requires: Iterable[str]) -> str | None:
    """The compiler and headers from pip that go with torch's CUDA libraries, in the version torch itself pins.

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
    """The whole environment of the build.

    `shell` is the caller's environment, `scripts` the bin folder of the Python that holds torch and cmake, `jobs` the
    number of compilers at once, `stage` the CUDA toolkit. Raises ValueError unless the stage goes with `target.cuda`.
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
        # HOROVOD_CUDA_HOME alone silently gives a CPU-only build: torch, too, must find the toolkit.
        result |= {
            "CUDA_HOME": str(stage.root),
            "CUDACXX": str(stage.bin / "nvcc"),
            "HOROVOD_CUDA_HOME": str(stage.root),
            "HOROVOD_NCCL_INCLUDE": str(stage.nccl_include),
            "HOROVOD_NCCL_LIB": str(stage.lib),
        }
    return result | {"PATH": ":".join(path)}
