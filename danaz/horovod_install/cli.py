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
from danaz.horovod_install.check import Health, check_horovod
from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import HOROVOD_VERSION, Target, full_version
from danaz.horovod_install.target import compile_jobs, installed_horovod, target_at_hand

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Build Horovod for the torch at hand, and check that it works.",
)
_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)

_INSTALL_EXAMPLES = """\
**Examples**

  danaz horovod install             with NCCL when torch is a CUDA build

  danaz horovod install --jobs 1    where memory is short (2 GB a compiler)
"""
_CHECK_EXAMPLES = """\
**Examples**

  danaz horovod check               versions, and an all-reduce of 2 ranks

  danaz horovod check --ranks 8     with 8 GPUs also through NCCL
"""


@app.command(epilog=_INSTALL_EXAMPLES)
def install(
    jobs: Annotated[
        int | None, typer.Option(min=1, show_default="what cores and memory allow", help="Compilers running at once.")
    ] = None,
    constraint: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="pip constraints for the packages the build needs.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build anew, although a fitting Horovod or wheel is there.")
    ] = False,
) -> None:
    """Build Horovod for the torch at hand and install it into this Python.

    Takes minutes the first time, seconds when the wheel is in the cache.
    """
    with _explained():
        target = target_at_hand()
        horovod = installed_horovod()
        if horovod is not None and horovod.version == full_version(target) and not force:
            _console.print(f"Horovod {HOROVOD_VERSION} for torch {target.torch} is installed already.")
            return
        _install(target, jobs or compile_jobs(), constraint, force)
        _console.print(_summary(check_horovod()), markup=False)


@app.command(epilog=_CHECK_EXAMPLES)
def check(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 2,
) -> None:
    """Report the installed Horovod, and let ranks of it sum a vector."""
    with _explained():
        _console.print(_summary(check_horovod(ranks)), markup=False)


def _install(target: Target, jobs: int, constraint: Path | None, force: bool) -> None:
    folder = cache.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "horovod-install.log"
    log.write_text(f"### Horovod for {target}\n")
    wheel = None if force else cache.find_wheel(target, folder / "wheels")
    if wheel is not None:
        _console.print(f"Horovod was built for torch {target.torch} before: taking {wheel}", soft_wrap=True)
    else:
        _console.print(
            f"Building Horovod for torch {target.torch}: about 4 minutes on 2 cores. The log: {log}", soft_wrap=True
        )
    with _display() as progress, tempfile.TemporaryDirectory(prefix="danaz-wheel-") as built:
        options = () if constraint is None else ("--constraint", str(constraint))
        tools = build.Toolbox(log, progress, options)
        if wheel is None:
            wheel = cache.store_wheel(build.build_wheel(target, Path(built), jobs, tools), folder / "wheels")
        build.install_wheel(wheel, tools)


@contextmanager
def _display() -> Iterator[build.Progress]:
    """One live line a step on a terminal; elsewhere (a log, CI) one plain line as each step begins."""
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
def _explained() -> Iterator[None]:
    """Show an error as its text, without a traceback, and exit with 1."""
    try:
        yield
    except HorovodError as error:
        _errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _summary(health: Health) -> str:
    parts = {
        "Horovod": health.version,
        "built for": f"torch {health.torch}, the one installed",
        "gloo": "yes" if health.gloo else "no",
        "NCCL": _nccl_version(health.nccl) if health.nccl else "no",
        "MPI": "yes" if health.mpi else "no",
    }
    lines = [f"  {name:<10} {value}" for name, value in parts.items()]
    sums = [f"  all-reduce {health.ranks} ranks on {device}: sum {total}" for device, total in health.sums.items()]
    return "\n".join([*lines, *sums, "Horovod works."])


def _nccl_version(code: int) -> str:
    """23007 -> 2.30.7: major * 10000 + minor * 100 + patch, since NCCL 2.9."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"
