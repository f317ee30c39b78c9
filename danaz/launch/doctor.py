"""Checks whether the machines of a cluster can train together, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from danaz.launch.meter import Meter
from danaz.launch.probe import METER, versions
from danaz.launch.reach import Reach, namesakes, unfit
from launcher.hosts import Host
from launcher.plan import slots_of
from launcher.survey import Finding

MAX_CLOCK_SKEW_S = 1.0
MIN_FREE_DISK_BYTES = 1 << 30
WIDTH = 150  # of the table where there is no terminal
COLUMNS = (
    "host", "reached", "Python", "danaz", "torch", "Horovod", "cores", "GPUs", "slots", "address", "round trip",
    "bandwidth", "clock", "free disk",
)  # fmt: skip


@dataclass(frozen=True)
class Checkup:
    """One host: what it is, what is wrong with it, and what is odd but may be intended."""

    host: Host
    finding: Finding
    problems: Sequence[str]
    warnings: Sequence[str]


def examine(hosts: Sequence[Host], reach: Reach, collective: str) -> list[Checkup]:
    """Find out which hosts can be reached, then how well; all at the same time. Raises KeyboardInterrupt."""
    hub = reach.server
    findings = reach.survey(hosts, hub)
    address = findings[hub.name].machine.address
    if address is not None and reach.is_direct(hub):
        well = [host for host in hosts if findings[host.name].problem is None]
        with Meter(address) as meter:
            measured = replace(reach, env={METER: f"{address}:{meter.port}"}).survey(well, hub)
        findings |= {host.name: measured[host.name] for host in well}
    elif findings[hub.name].problem is not None and hub not in hosts:
        hosts = [*hosts, hub]
    same = namesakes(hosts, {name: finding.machine for name, finding in findings.items()})
    return [check_up(host, _with_problem(findings[host.name], same.get(host.name)), collective) for host in hosts]


def _with_problem(finding: Finding, problem: str | None) -> Finding:
    return finding if problem is None or finding.problem is not None else replace(finding, problem=problem)


def check_up(host: Host, finding: Finding, collective: str) -> Checkup:
    """Say what is wrong or odd about a host."""
    report, name = finding.report, host.name
    problems = [finding.problem] if finding.problem else []
    if "versions" not in report:
        return Checkup(host, finding, problems, [])
    problems += unfit(name, finding, collective)
    here, there = versions(), report["versions"]
    if there["torch"] not in (None, here["torch"]):
        problems.append(f"{name}: torch {there['torch']} there, {here['torch']} here; install the same")
    if collective == "horovod" and there["horovod"] is not None and report.get("horovod_problem"):
        problems.append(f"{name}: {report['horovod_problem']}")
    if report.get("free_disk_bytes", MIN_FREE_DISK_BYTES) < MIN_FREE_DISK_BYTES:
        problems.append(f"{name}: {_size(report['free_disk_bytes'])} are free on the disk of its working directory")
    warnings = []
    if there["python"] != here["python"]:
        warnings.append(f"{name}: Python {there['python']} there, {here['python']} here")
    if abs(report.get("clock_ahead_s", 0.0)) > MAX_CLOCK_SKEW_S:
        warnings.append(f"{name}: its clock is {_skew(report['clock_ahead_s'])}; times in logs will not agree")
    slots = slots_of(host, {name: finding.machine})
    if 0 < finding.machine.gpus < slots:
        warnings.append(f"{name}: {slots} slots for {finding.machine.gpus} GPUs; several ranks will share one")
    return Checkup(host, finding, problems, warnings)


def show(checkups: Sequence[Checkup]) -> int:
    """Print the table and what is wrong. Return the exit code: 1 if a host cannot take part."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    table = Table(box=None, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in ("host", "address") else "right")
    for each in checkups:
        style = "red" if each.problems else "yellow" if each.warnings else "green"
        table.add_row(*_row(each), style=style)
    console.print(table)
    for each in checkups:
        for problem in each.problems:
            console.print(f"✗ {problem}", style="red", markup=False, soft_wrap=True)
        for warning in each.warnings:
            console.print(f"! {warning}", style="yellow", markup=False, soft_wrap=True)
    broken = sum(bool(each.problems) for each in checkups)
    console.print(f"{broken} of {len(checkups)} hosts cannot take part." if broken else "All hosts can take part.")
    return 1 if broken else 0


def _row(each: Checkup) -> list[str]:
    report, machine = each.finding.report, each.finding.machine
    if "versions" not in report:
        return [each.host.name, "no"]
    there = report["versions"]
    measured = "round_trip_ms" in report
    return [
        each.host.name,
        "yes" if report["unreachable"] is None else "not the server",
        *(_short(there[package]) for package in ("python", "danaz", "torch", "horovod")),
        str(machine.cores),
        str(machine.gpus),
        str(slots_of(each.host, {each.host.name: machine})),
        _where(machine.address, machine.interface),
        *(_measured(report) if measured else ["–"] * 4),
    ]


def _measured(report: Mapping[str, float]) -> list[str]:
    return [
        f"{report['round_trip_ms']:.2f} ms",
        f"{report['bandwidth_mb_s']:.0f} MB/s",
        _skew(report["clock_ahead_s"]),
        _size(report["free_disk_bytes"]),
    ]


def _where(address: str | None, interface: str | None) -> str:
    return "–" if address is None else f"{address} ({interface})"


def _short(version: str | None) -> str:
    """Return a version without what follows a +, such as the torch that Horovod was built for."""
    return "none" if version is None else version.partition("+")[0]


def _skew(ahead_s: float) -> str:
    return f"{abs(ahead_s):.3f} s {'ahead' if ahead_s >= 0 else 'behind'}"


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
