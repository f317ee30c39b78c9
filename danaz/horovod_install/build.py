"""Build and install Horovod. Each step is a subprocess, and all write to one log file."""

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import (
    BUILD_REQUIREMENTS,
    HOROVOD_SHA256,
    HOROVOD_VERSION,
    RUN_REQUIREMENTS,
    Target,
    environment,
    toolkit_requirement,
)
from danaz.horovod_install.stage import stage_toolkit
from danaz.horovod_install.target import nvidia_folder
from launcher.start import module_command

# Called with the name of a step, and with the percentage that is done if it is known.
Progress = Callable[[str, int | None], None]

# Program -> the package that contains it (Debian and Ubuntu; Fedora and RHEL).
_TOOLS = {"g++": ("g++", "gcc-c++"), "make": ("make", "make")}
_HEADERS = ("python3-dev", "python3-devel")

_RELEVANT = re.compile(
    r"\berror\b|Error:|fatal|not found|could not find|undefined reference|killed|no space", re.IGNORECASE
)
# Lines of make and CMake that report no error: commands, and progress lines that may name a file like error.cc.
_NOISE = re.compile(
    r"\s*(cd /|/\S+/(c\+\+|g\+\+|gcc|cc|nvcc|cmake|gmake|make) |\[\s*\d+%]|-- Could not find CCache|raise )"
)
_HINTS = (
    (r"Killed|cc1plus.*terminated", "A compiler was killed, most likely because memory ran out: try --jobs 1."),
    (r"unrecognized command.line option.*-std=", "The compiler is too old for C++20: g++ 11 or newer is needed."),
    (r"No space left on device", "The disk is full; the build needs about 1 GB in the temporary folder (TMPDIR)."),
    (r"name resolution|NewConnectionError|Network is unreachable", "pip could not reach the package index."),
    (
        r"DO NOT MATCH THE HASHES",
        "What the package index sent is not the Horovod release that danaz knows. Nothing of it was run. Ask the "
        "administrator of the index.",
    ),
    (r"No module named pip", "This Python has no pip: run `python -m ensurepip`."),
)


@dataclass(frozen=True)
class Toolbox:
    """What all steps of a build share: log, progress display and options of pip."""

    log: Path
    progress: Progress
    pip_options: tuple[str, ...] = ()  # such as ("--constraint", "constraints.txt")

    def pip(self, step: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Run pip of this Python. The log gets its output; the progress display gets make's `[ 42%]` lines.

        Raises HorovodError if pip fails.
        """
        command = module_command("pip", "--disable-pip-version-check", *arguments)
        self.progress(step, None)
        with self.log.open("a", errors="replace") as log:
            log.write(f"\n### {step}\n$ {' '.join(command)}\n")
            code = run_command(command, env, lambda line: self._note(log.write, step, line))
        if code != 0:
            raise HorovodError(explain_failure(step, code, self.log))

    def _note(self, write: Callable[[str], object], step: str, line: str) -> None:
        write(line)
        if match := re.match(r"\s*\[\s*(\d+)%]", line):
            self.progress(step, int(match[1]))


def missing_tools(search_path: str, include: Path) -> list[str]:
    """Return what the build needs and does not find: programs on `search_path`, Python's headers in `include`."""
    missing = [program for program in _TOOLS if shutil.which(program, path=search_path) is None]
    return missing if (include / "Python.h").is_file() else [*missing, "Python.h"]


def require_tools(search_path: str | None = None, include: Path | None = None) -> None:
    """Raise HorovodError if tools are missing. It names them and the command that installs them."""
    search_path = os.environ.get("PATH", "") if search_path is None else search_path
    missing = missing_tools(search_path, include or Path(sysconfig.get_path("include")))
    if missing:
        debian, fedora = zip(*(_TOOLS.get(name, _HEADERS) for name in missing), strict=True)
        raise HorovodError(
            f"Horovod is compiled on this machine, and these are missing: {', '.join(missing)}.\n"
            f"Install them with `apt-get install {' '.join(debian)}` (Debian, Ubuntu) "
            f"or `dnf install {' '.join(fedora)}` (Fedora, RHEL), then run this again."
        )


def build_wheel(target: Target, folder: Path, jobs: int, tools: Toolbox) -> Path:
    """Build Horovod for `target` into a wheel in `folder`, which takes minutes. Returns the wheel's path.

    Raises HorovodError with the cause from the log.
    """
    require_tools()
    tools.pip("Installing build tools", "install", *tools.pip_options, *_requirements(target))
    with tempfile.TemporaryDirectory(prefix="danaz-horovod-") as name:
        work = Path(name)
        stage = None if target.cuda is None else stage_toolkit(nvidia_folder(), target.cuda, work / "cuda")
        env = environment(target, os.environ, Path(sysconfig.get_path("scripts")), jobs, stage)
        # Download and build are two steps: pip refuses a release 0.28.1 of an index that builds as 0.28.1+torch...
        source = download_source(work, tools)
        tools.pip(
            f"Compiling Horovod {HOROVOD_VERSION}",
            *("wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir"),
            *("--wheel-dir", str(folder), str(source)),
            env=env,
        )
    (wheel,) = folder.glob("horovod-*.whl")
    return wheel


def download_source(folder: Path, tools: Toolbox) -> Path:
    """Download Horovod's sdist into ``folder``. Returns its path.

    Raises HorovodError if its hash is not HOROVOD_SHA256; pip runs nothing of such an sdist.
    """
    known = folder / "horovod.txt"
    known.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{HOROVOD_SHA256}\n")
    tools.pip(
        f"Downloading Horovod {HOROVOD_VERSION}",
        *("download", "--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--require-hashes"),
        *("--dest", str(folder), "--requirement", str(known)),
    )
    (source,) = folder.glob("horovod-*.tar.gz")
    return source


def _requirements(target: Target) -> list[str]:
    if target.cuda is None:
        return [*BUILD_REQUIREMENTS]
    toolkit = toolkit_requirement(requires("torch") or ())
    return [*BUILD_REQUIREMENTS, *([toolkit] if toolkit else [])]


def install_wheel(wheel: Path, tools: Toolbox) -> None:
    """Install a built wheel, and the packages that it imports, into this Python. Raises HorovodError."""
    tools.pip("Installing run-time packages", "install", *tools.pip_options, *RUN_REQUIREMENTS)
    tools.pip("Installing Horovod", "install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))


def explain_failure(step: str, code: int, log: Path) -> str:
    """Return a message that says what failed, quotes the lines of the log that say why, and hints at known causes."""
    text = log.read_text(errors="replace").rpartition("\n### ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _NOISE.match(line)]
    relevant = [line for line in lines if _RELEVANT.search(line)] or lines
    # The first lines name the cause; the last ones are pip's summary.
    shown = relevant if len(relevant) <= 12 else [*relevant[:8], "…", *relevant[-3:]]
    hints = [hint for pattern, hint in _HINTS if re.search(pattern, text)]
    causes = [f"  {line[:200]}" for line in shown]
    return "\n".join(
        [f"{step} failed (pip ended with exit code {code}):", *causes, *hints, f"The whole log is in {log}"]
    )


def run_command(command: Sequence[str], env: Mapping[str, str] | None, on_line: Callable[[str], None]) -> int:
    """Run a command and return its exit code. If an exception interrupts it, all processes that it started end too."""
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that killpg reaches make and the compilers
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                on_line(line)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return process.returncode
