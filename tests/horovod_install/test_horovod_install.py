"""The Horovod installer: its recipe, CUDA staging, cache and errors, and the real Horovod that it installed."""

import dataclasses
import hashlib
import io
import os
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from danaz.horovod_install import build, cache, check, recipe, stage, target
from danaz.horovod_install.cli import app
from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import CudaStage, Target

GPU = Target(
    torch="2.14.1+cu130",
    cuda="13.0",
    cuda_architectures=("75", "90"),
    cpu_flags=frozenset({"avx", "fma", "sse"}),
    python_tag="cp311",
    platform="linux_x86_64",
    libc="glibc 2.36",
)
CPU = dataclasses.replace(GPU, torch="2.14.1+cpu", cuda=None, cuda_architectures=())
SCRIPTS = Path("/venv/bin")
STAGE = CudaStage(Path("/stage"), Path("/nccl/include"))


# The recipe: the build environment for each torch.


def test_cpu_torch_gets_no_gpu_operations():
    env = recipe.environment(CPU, {"PATH": "/usr/bin"}, SCRIPTS, jobs=3)

    assert env["HOROVOD_WITH_PYTORCH"] == env["HOROVOD_WITH_GLOO"] == env["HOROVOD_WITHOUT_MPI"] == "1"
    assert not [name for name in env if "CUDA" in name or "GPU" in name or "NCCL" in name]
    assert env["PATH"] == "/venv/bin:/usr/bin"
    assert env["HOROVOD_CMAKE"] == "/venv/bin/cmake"
    assert env["MAKEFLAGS"] == "-j3"


def test_cuda_torch_gets_nccl_and_the_staged_toolkit_first():
    env = recipe.environment(GPU, {"PATH": "/usr/local/cuda/bin:/usr/bin"}, SCRIPTS, jobs=1, stage=STAGE)

    assert env["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert env["HOROVOD_BUILD_CUDA_CC_LIST"] == "75,90"
    assert env["PATH"].split(":")[0] == "/stage/bin"
    assert env["CUDA_HOME"] == "/stage"
    assert env["HOROVOD_NCCL_LIB"] == "/stage/lib64"


@pytest.mark.parametrize(("target_", "stage_"), [(GPU, None), (CPU, STAGE)])
def test_a_stage_goes_with_a_cuda_target_only(target_, stage_):
    with pytest.raises(ValueError, match="CUDA stage"):
        recipe.environment(target_, {}, SCRIPTS, jobs=1, stage=stage_)


def test_the_users_shell_cannot_change_the_build():
    strange = {
        "HOROVOD_WITH_MPI": "1",
        "CUDA_HOME": "/usr/local/cuda",
        "CMAKE_GENERATOR": "Ninja",
        "MAKEFLAGS": "-j9 -k",
    }
    shell = {"PATH": "/usr/bin", "HOME": "/home/me", "https_proxy": "http://proxy"}

    assert recipe.environment(CPU, shell | strange, SCRIPTS, 2) == recipe.environment(CPU, shell, SCRIPTS, 2)
    assert recipe.environment(CPU, shell, SCRIPTS, 2)["https_proxy"] == "http://proxy"


def test_half_precision_flags_are_those_of_the_processor():
    assert recipe.settings(GPU)["HOROVOD_BUILD_ARCH_FLAGS"] == "-mavx -mfma"
    on_arm = dataclasses.replace(GPU, cpu_flags=frozenset())
    assert recipe.settings(on_arm)["HOROVOD_BUILD_ARCH_FLAGS"] == ""


def test_toolkit_has_the_version_that_torch_pins():
    pins = ["filelock", 'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"', "nvidia-nccl-cu13==2.30.7"]
    assert recipe.toolkit_requirement(pins) == "cuda-toolkit[nvcc,cccl]==13.0.3"
    assert recipe.toolkit_requirement(["filelock", "sympy>=1.13"]) is None


def test_gethostname_answers_with_the_address_of_the_named_interface(tmp_path):
    """This is the workaround for Horovod's multi-host bug, force-included as in every source of Horovod."""
    source, program = tmp_path / "name.cc", tmp_path / "name"
    source.write_text(
        "#include <cstdio>\n#include <unistd.h>\n"
        "int main() { char name[256]; if (gethostname(name, sizeof name) != 0) return 1; std::puts(name); }\n"
    )
    header = recipe.TOOLCHAIN / "gethostname.h"
    subprocess.run(["g++", "-std=c++11", "-Wall", "-Werror", "-include", header, source, "-o", program], check=True)

    def name(interface: str) -> str:
        env = os.environ | {"HOROVOD_GLOO_IFACE": interface}
        return subprocess.run([program], env=env, check=True, capture_output=True, text=True).stdout.strip()

    assert name("lo") == "127.0.0.1"
    assert name("") == socket.gethostname()
    assert name("no-such-interface") == socket.gethostname()


# Names of wheels, which are the keys of the cache.


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "2.14.2+cu130"},
        {"cuda_architectures": ("75", "90", "100")},
        {"cpu_flags": frozenset({"avx"})},
        {"libc": "glibc 2.39"},
    ],
)
def test_another_target_needs_another_wheel(change):
    assert recipe.full_version(GPU) != recipe.full_version(dataclasses.replace(GPU, **change))


def test_facts_that_do_not_shape_the_wheel_do_not_change_its_name():
    other_processor = dataclasses.replace(GPU, cpu_flags=frozenset({"avx", "fma", "avx512f"}))
    assert recipe.full_version(GPU) == recipe.full_version(other_processor)


def test_a_changed_toolchain_changes_the_name(tmp_path, monkeypatch):
    before = recipe.full_version(GPU)
    shutil.copytree(recipe.TOOLCHAIN, tmp_path / "toolchain")
    monkeypatch.setattr(recipe, "TOOLCHAIN", tmp_path / "toolchain")
    assert recipe.full_version(GPU) == before
    (tmp_path / "toolchain/gethostname.h").write_text("// nothing")
    assert recipe.full_version(GPU) != before


def test_the_name_says_what_it_was_built_for():
    assert recipe.full_version(GPU).startswith("0.28.1+torch2.14.1.cu130.r")


def test_cache_gives_back_the_wheel_of_exactly_this_target(tmp_path):
    wheel = tmp_path / f"horovod-{recipe.full_version(GPU)}-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    wheels = tmp_path / "cache" / "wheels"
    assert cache.find_wheel(GPU, wheels) is None

    stored = cache.store_wheel(wheel, wheels)

    assert cache.find_wheel(GPU, wheels) == stored
    assert stored.read_bytes() == b"wheel"
    for other in (
        CPU,
        dataclasses.replace(GPU, python_tag="cp312"),
        dataclasses.replace(GPU, platform="linux_aarch64"),
    ):
        assert cache.find_wheel(other, wheels) is None


@pytest.mark.parametrize("harm", ["altered", "torn", "hash missing", "hash of another", "hash that is no text"])
def test_a_wheel_that_is_not_as_it_was_stored_is_not_taken(harm, tmp_path):
    wheel = tmp_path / f"horovod-{recipe.full_version(GPU)}-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    stored = cache.store_wheel(wheel, tmp_path / "wheels")
    [beside] = set(stored.parent.iterdir()) - {stored}
    assert cache.find_wheel(GPU, stored.parent) == stored
    match harm:
        case "altered":
            stored.write_bytes(b"wheeL")
        case "torn":
            stored.write_bytes(b"whe")
        case "hash missing":
            beside.unlink()
        case "hash of another":
            beside.write_text("0" * 64)
        case _:
            beside.write_bytes(b"\xff")
    assert cache.find_wheel(GPU, stored.parent) is None
    cache.store_wheel(wheel, stored.parent)
    assert cache.find_wheel(GPU, stored.parent) == stored


def test_a_store_cut_short_leaves_nothing_behind(tmp_path, monkeypatch):
    wheel = tmp_path / f"horovod-{recipe.full_version(GPU)}-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")

    def cut_short(source, sink):
        sink.write_bytes(source.read_bytes()[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", cut_short)
    with pytest.raises(KeyboardInterrupt):
        cache.store_wheel(wheel, tmp_path / "wheels")
    assert list((tmp_path / "wheels").iterdir()) == []


def test_cache_folder_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache.cache_folder() == Path("/elsewhere/danaz")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache/danaz"


# Staging the CUDA toolkit, which pip installs in several folders.


@pytest.fixture
def nvidia(tmp_path):
    """Make a small copy of site-packages/nvidia."""
    root = tmp_path / "site-packages" / "nvidia"
    for name in (
        "cu13/bin/nvcc",
        "cu13/nvvm/bin/cicc",
        "cu13/include/cuda_runtime.h",
        "cu13/include/cccl/cuda/std/version",
        "cu13/lib/libcudart.so.13",
        "cu13/lib/libcudart_static.a",
        "cu13/lib/libcheckpoint.so",
        "cu13/lib/libnvrtc-builtins.so.13.0",
        "nccl/include/nccl.h",
        "nccl/lib/libnccl.so.2",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_stage_has_the_layout_of_a_toolkit(nvidia, tmp_path):
    staged = stage.stage_toolkit(nvidia, "13.0", tmp_path / "cuda")

    contents = {
        staged.bin / "nvcc": "cu13/bin/nvcc",
        staged.root / "include/cuda_runtime.h": "cu13/include/cuda_runtime.h",
        staged.root / "nvvm/bin/cicc": "cu13/nvvm/bin/cicc",
        staged.lib / "libcudart.so": "cu13/lib/libcudart.so.13",
        staged.lib / "libcudart_static.a": "cu13/lib/libcudart_static.a",
        staged.lib / "libnvrtc-builtins.so": "cu13/lib/libnvrtc-builtins.so.13.0",
        staged.root / "lib/libnccl.so": "nccl/lib/libnccl.so.2",
        staged.nccl_include / "nccl.h": "nccl/include/nccl.h",
    }
    assert {path: path.read_text() for path in contents} == contents
    assert not staged.bin.is_symlink()


@pytest.mark.parametrize("gone", ["cu13/bin/nvcc", "cu13/include/cuda_runtime.h", "nccl/lib/libnccl.so.2"])
def test_an_incomplete_toolkit_is_refused_by_name(nvidia, tmp_path, gone):
    (nvidia / gone).unlink()
    with pytest.raises(HorovodError, match=gone) as error:
        stage.stage_toolkit(nvidia, "13.0", tmp_path / "cuda")
    assert "cuda-toolkit[nvcc,cccl]" in str(error.value)
    assert not (tmp_path / "cuda").exists()


# Errors name the cure.


def only(folder: Path, *programs: str) -> str:
    """Return a PATH that has only these programs."""
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(shutil.which(program) or pytest.fail(f"{program} is needed by this test"))
    return str(folder)


def test_every_missing_tool_is_named_with_its_package(tmp_path):
    with pytest.raises(HorovodError) as error:
        build.require_tools(only(tmp_path / "bin", "make"), tmp_path)
    assert "missing: g++, Python.h." in str(error.value)
    assert "apt-get install g++ python3-dev" in str(error.value)
    assert "dnf install gcc-c++ python3-devel" in str(error.value)


def test_with_all_tools_nothing_is_missing(tmp_path):
    search_path = only(tmp_path / "bin", "g++", "make")
    assert build.missing_tools(search_path, Path(sysconfig.get_path("include"))) == []


def test_install_without_a_compiler_says_so_and_fails(tmp_path):
    env = os.environ | {"PATH": only(tmp_path / "bin", "make"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "danaz.horovod_install", "install", "--force"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert "g++" in result.stderr
    assert "apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


LOG = """
### Installing build tools
error: of an earlier step
### Compiling Horovod 0.28.1
$ python -m pip wheel
  -- The CXX compiler identification is GNU 9.4.0
  [ 12%] Building CXX object third_party/gloo/error.cc.o
  /usr/bin/c++ -Wall -o error.cc.o -c error.cc
  c++: error: unrecognized command-line option '-std=c++20'
  gmake[2]: *** [error.cc.o] Error 1
  ERROR: Failed building wheel for horovod
"""


def test_a_failed_step_shows_the_cause_a_hint_and_the_log(tmp_path):
    log = tmp_path / "install.log"
    log.write_text(LOG)
    text = build.explain_failure("Compiling Horovod 0.28.1", 1, log)
    assert "unrecognized command-line option" in text
    assert "g++ 11 or newer" in text
    assert str(log) in text
    assert "earlier step" not in text
    assert "Building CXX object" not in text
    assert "/usr/bin/c++" not in text


def fake_sdist(folder: Path, ran: Path) -> str:
    """Make an sdist of Horovod that creates the file ``ran`` as soon as any of it is run. Returns its SHA-256."""
    setup = f"import pathlib, setuptools\npathlib.Path({str(ran)!r}).touch()\n"
    setup += "setuptools.setup(name='horovod', version='0.28.1')\n"
    info = "Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n"
    path = folder / "horovod-0.28.1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"setup.py": setup, "PKG-INFO": info}.items():
            entry = tarfile.TarInfo(f"horovod-0.28.1/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_nothing_is_run_of_a_horovod_that_is_not_the_known_one(tmp_path, monkeypatch):
    index, work, ran = tmp_path / "index", tmp_path / "work", tmp_path / "ran"
    index.mkdir(), work.mkdir()
    sha256 = fake_sdist(index, ran)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    tools = build.Toolbox(tmp_path / "install.log", lambda step, percent: None)
    with pytest.raises(HorovodError, match="is not the Horovod release that danaz knows"):
        build.download_source(work, tools)
    assert not ran.exists()
    assert not [*work.glob("*.tar.gz")]
    monkeypatch.setattr(build, "HOROVOD_SHA256", sha256)
    assert build.download_source(work, tools).name == "horovod-0.28.1.tar.gz"
    assert ran.exists(), "pip runs a part of the sdist that it downloads"


def test_a_failing_pip_becomes_an_error_with_its_words(tmp_path):
    steps = []
    tools = build.Toolbox(tmp_path / "install.log", lambda step, percent: steps.append(step))
    with pytest.raises(HorovodError, match="Installing nothing failed") as error:
        tools.pip("Installing nothing", "install", "--no-index", str(tmp_path / "absent.whl"))
    assert "absent.whl" in str(error.value)
    assert steps == ["Installing nothing"]


PREREQUISITES = Path(__file__).parents[2] / "scripts/check_prerequisites.sh"


def prerequisites(search_path: str, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PREREQUISITES, python], env={"PATH": search_path}, capture_output=True, text=True)


def test_prerequisites_are_met_where_these_tests_run():
    result = prerequisites(os.environ["PATH"], sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_prerequisites_name_what_is_missing_and_the_cure(tmp_path):
    result = prerequisites(only(tmp_path / "bin", "uname"), "python3")
    assert result.returncode == 1
    assert "apt-get install python3 python3-venv python3-dev g++ make" in result.stderr


def test_prerequisites_refuse_an_old_compiler(tmp_path):
    search_path = only(tmp_path / "bin", "uname", "make")
    (tmp_path / "bin/g++").write_text("#!/bin/sh\necho 9\n")
    (tmp_path / "bin/g++").chmod(0o755)
    result = prerequisites(search_path, sys.executable)
    assert result.returncode == 1
    assert "g++ >= 11" in result.stderr
    assert "version 9" in result.stderr


# The installed Horovod. These tests are never skipped: without Horovod, danaz is not set up.


def test_horovod_really_sums_over_two_ranks():
    health = check.check_horovod(ranks=2)
    assert health.sums["cpu"] == [3.0, 6.0, 9.0, 12.0]  # (1 + 2) * VECTOR
    assert health.gloo
    assert health.version.startswith("0.28.1")
    assert health.torch == str(torch.__version__)


def test_horovod_speaks_nccl_when_torch_is_a_cuda_build():
    assert bool(check.check_horovod(ranks=1).nccl) == (torch.version.cuda is not None)


def test_the_installed_horovod_is_the_recipes_and_install_has_nothing_to_do():
    result = CliRunner().invoke(app, ["install"])
    assert result.exit_code == 0, result.output
    assert "is already installed" in result.output


def test_check_reports_in_words():
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0, result.output
    for words in ("0.28.1", f"torch {torch.__version__}", "gloo", "NCCL", "MPI", "2 ranks", "Horovod works"):
        assert words in result.output


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        (None, "not installed"),
        (target.InstalledHorovod("0.28.1+torch9.9.r00000000", "9.9"), "built for torch 9.9"),
        (target.InstalledHorovod("0.28.1", None), "without PyTorch"),
    ],
)
def test_check_refuses_a_missing_or_stale_horovod_and_names_the_cure(monkeypatch, installed, words):
    monkeypatch.setattr(check, "installed_horovod", lambda: installed)
    with pytest.raises(HorovodError, match=words) as error:
        check.check_horovod()
    assert "danaz horovod install" in str(error.value)


def test_a_rank_that_fails_is_reported_with_its_last_words(monkeypatch):
    healthy = check.rank_environment
    # Nobody listens on port 1 of loopback, so the ranks cannot meet.
    monkeypatch.setattr(check, "rank_environment", lambda rank, ranks, port: healthy(rank, ranks, port=1))
    with pytest.raises(HorovodError, match="Rank 0 ended with exit code") as error:
        check.check_horovod()
    assert "HTTP request failed" in str(error.value)


def test_stopping_the_build_stops_what_it_started():
    """A compiler that is a grandchild of the build must not outlive Ctrl-C."""
    grandchild = []

    def interrupt(line: str) -> None:
        grandchild.append(os.pidfd_open(int(line)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.run_command(["sh", "-c", "sh -c 'echo $$; exec sleep 600'; true"], None, interrupt)
    try:
        ended, _, _ = select.select(grandchild, [], [], 10)  # a pidfd is readable once its process has ended
        assert ended == grandchild
    finally:
        os.close(grandchild[0])
