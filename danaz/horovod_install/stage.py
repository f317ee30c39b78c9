"""Stage the CUDA toolkit that pip installed: make links in the layout that nvcc, CMake and torch expect.

The pip packages contain a whole toolkit, but it is spread over `nvidia/cu13` and `nvidia/nccl`, and has neither `lib64`
nor the unversioned `lib*.so` that a linker needs. The staged toolkit works on every machine, whatever toolkit is
installed there, and always has the version that torch was built with.
"""

import re
from pathlib import Path

from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import CudaStage


def stage_toolkit(nvidia: Path, cuda: str, root: Path) -> CudaStage:
    """Stage the toolkit in `nvidia` (site-packages/nvidia) for CUDA version `cuda` ("13.0") in the new folder `root`.

    Raises HorovodError, which names the missing files, if the pip packages are incomplete.
    """
    toolkit = nvidia / f"cu{cuda.split('.')[0]}"
    nccl = nvidia / "nccl"
    _require(toolkit, nccl, cuda)
    # bin is a real folder of links: nvcc and CMake look for headers and libraries next to the folder of nvcc.
    (root / "bin").mkdir(parents=True)
    (root / "lib64").mkdir()
    (root / "lib").symlink_to("lib64")
    (root / "include").symlink_to(toolkit / "include")
    (root / "nvvm").symlink_to(toolkit / "nvvm")
    for tool in (toolkit / "bin").iterdir():
        (root / "bin" / tool.name).symlink_to(tool)
    for library in (*(toolkit / "lib").iterdir(), *(nccl / "lib").iterdir()):
        (root / "lib64" / library.name).symlink_to(library)
    _link_unversioned(root / "lib64")
    return CudaStage(root, nccl / "include")


def _require(toolkit: Path, nccl: Path, cuda: str) -> None:
    needed = (
        toolkit / "bin/nvcc",
        toolkit / "nvvm/bin/cicc",
        toolkit / "include/cuda_runtime.h",
        toolkit / "include/cccl",
        nccl / "include/nccl.h",
        nccl / "lib/libnccl.so.2",
    )
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise HorovodError(
            f"torch is a CUDA {cuda} build, so Horovod is built with the CUDA {cuda} toolkit and NCCL from pip.\n"
            f"Missing: {', '.join(missing)}.\n"
            "Install torch from the default package index, and with it `cuda-toolkit[nvcc,cccl]` in the version that "
            "`pip show torch` requires."
        )


def _link_unversioned(folder: Path) -> None:
    """Make links such as `libcudart.so -> libcudart.so.13`: `-lcudart` needs them, and the pip packages lack them."""
    for library in sorted(folder.iterdir()):
        if match := re.match(r"(lib.+?\.so)\.[\d.]+$", library.name):
            link = folder / match[1]
            if not link.is_symlink():
                link.symlink_to(library.name)
