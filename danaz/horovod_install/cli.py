"""`danaz horovod install` and `danaz horovod check`."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from danaz.horovod_install import build, cache
from danaz.horovod_install.check import CheckedHorovod, check_horovod
from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import HOROVOD_VERSION, Target, full_version
from danaz.horovod_install.target import compile_jobs, installed_horovod, target_at_hand

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Build Horovod for the installed torch, and check that it works.",
)
_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)

_INSTALL_EXAMPLES = """\
**Examples**

  danaz horovod install             with NCCL if torch is a CUDA build

  danaz horovod install --jobs 1    if memory is short (2 GB per compiler)
"""
_CHECK_EXAMPLES = """\
**Examples**

  danaz horovod check               show versions, and try an all-reduce with 2 ranks

  danaz horovod check --ranks 8     on 8 GPUs, try NCCL too
"""


@app.command(epilog=_INSTALL_EXAMPLES)
def install(
    jobs: Annotated[
        int | None,
        typer.Option(min=1, show_default="as many as cores and memory allow", help="Number of compilers at a time."),
    ] = None,
    constraint: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File of pip constraints for the packages that the build needs."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Build again, even if the right Horovod is installed or its wheel is in the cache."
        ),
    ] = False,
) -> None:
    """Build Horovod for the installed torch, and install it into this Python.

    This takes minutes the first time, and seconds if the wheel is in the cache.
    """
    with _errors_as_text():
        target = target_at_hand()
        horovod = installed_horovod()
        if horovod is not None and horovod.version == full_version(target) and not force:
            _console.print(f"Horovod {HOROVOD_VERSION} for torch {target.torch} is already installed.")
            return
        _install(target, jobs or compile_jobs(), constraint, force)
        _console.print(_summary(check_horovod()), markup=False)


@app.command(epilog=_CHECK_EXAMPLES)
def check(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 2,
) -> None:
    """Show the versions of the installed Horovod, and let its ranks sum a vector."""
    with _errors_as_text():
        _console.print(_summary(check_horovod(ranks)), markup=False)


def _install(target: Target, jobs: int, constraint: Path | None, force: bool) -> None:
    folder = cache.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "horovod-install.log"
    log.write_text(f"### Horovod for {target}\n")
    wheel = None if force else cache.find_wheel(target, folder / "wheels")
    if wheel is not None:
        _console.print(
            f"Installing the Horovod that was built earlier for torch {target.torch}: {wheel}", soft_wrap=True
        )
    else:
        _console.print(
            f"Building Horovod for torch {target.torch}; this takes about 4 minutes on 2 cores. The log is {log}",
            soft_wrap=True,
        )
    with _display() as progress, tempfile.TemporaryDirectory(prefix="danaz-wheel-") as built:
        options = () if constraint is None else ("--constraint", str(constraint))
        tools = build.Toolbox(log, progress, options)
        if wheel is None:
            wheel = cache.store_wheel(build.build_wheel(target, Path(built), jobs, tools), folder / "wheels")
        build.install_wheel(wheel, tools)


@contextmanager
def _display() -> Iterator[build.Progress]:
    """Show progress: on a terminal, a live line for each step; elsewhere, a plain line when a step begins."""
    seen: dict[str, TaskID] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, disable=not _console.is_terminal) as live:

        def show(step: str, percent: int | None) -> None:
            if step not in seen:
                _finish(live, seen.values())
                seen[step] = live.add_task(step, total=None)
                if not _console.is_terminal:
                    _console.print(f"  {step} …")
            if percent is not None:
                live.update(seen[step], total=100, completed=percent)

        yield show
        _finish(live, seen.values())


def _finish(live: Progress, tasks: Iterable[TaskID]) -> None:
    for task in tasks:
        live.update(task, total=100, completed=100)


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """Print a HorovodError without traceback, and exit with code 1."""
    try:
        yield
    except HorovodError as error:
        _errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _summary(found: CheckedHorovod) -> str:
    parts = {
        "Horovod": found.version,
        "built for": f"torch {found.torch}, which is installed",
        "gloo": "yes" if found.gloo else "no",
        "NCCL": _nccl_version(found.nccl) if found.nccl else "no",
        "MPI": "yes" if found.mpi else "no",
    }
    lines = [f"  {name:<10} {value}" for name, value in parts.items()]
    sums = [f"  all-reduce of {found.ranks} ranks on {device}: sum {total}" for device, total in found.sums.items()]
    return "\n".join([*lines, *sums, "Horovod works."])


def _nccl_version(code: int) -> str:
    """Turn 23007 into "2.30.7". Since NCCL 2.9, a version code is major * 10000 + minor * 100 + patch."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"
