"""Options that several commands share: each is named, and explained, once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from danaz.run.schedules import SCHEDULE_FORMS, SCHEDULES

# An option in a panel of its own kind, where `--help` would otherwise be one long list.
exchange_option = partial(typer.Option, rich_help_panel="Exchange with the server")
machines_option = partial(typer.Option, rich_help_panel="Machines")
remote_option = partial(typer.Option, rich_help_panel="Other machines, by ssh")

# ---- what is trained -------------------------------------------------------------------------------------------------

Experiment = Annotated[Path, typer.Argument(help="YAML of an experiment, e.g. configs/digits.yaml", metavar="CONFIG")]
Algorithm = Annotated[
    str | None,
    typer.Option("--algorithm", "-a", help="Update rule: dana, nag-asgd, ssgd, …; `danaz algorithms` lists them"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config, e.g. `--set lr=0.05`. Repeatable."),
]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Run folder. Default: runs/TIME-NAME")]
Record = Annotated[bool, typer.Option("--record", help="Keep every message for `danaz replay`")]
Collective = Annotated[
    str, typer.Option("--collective", help="Inside a worker: `horovod`, `torch` (torch.distributed), or `auto`")
]

# ---- simulated workers -----------------------------------------------------------------------------------------------

Workers = Annotated[int | None, typer.Option("--workers", "-n", help="Number of simulated workers")]
Schedule = Annotated[
    str | None,
    typer.Option(
        help=f"Order in which simulated workers push: {', '.join((*SCHEDULES, *SCHEDULE_FORMS.values()))}. "
        "Default: the config's"
    ),
]
Device = Annotated[
    str | None, typer.Option(help="`cpu`, `cuda` or `auto`: a GPU if there is one. Default: the config's, `auto`")
]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Simulations at a time. Default: one a core")]

# ---- between workers and the server ----------------------------------------------------------------------------------

SyncPeriod = Annotated[
    int | None, exchange_option("--sync-period", min=1, metavar="K", help="Push the sum of K local steps")
]
Wire = Annotated[
    str | None,
    exchange_option("--wire", help="Send pushes as fp32, bf16, fp16, onebit or topk:SHARE, with error feedback"),
]
WireView = Annotated[str | None, exchange_option("--wire-view", help="Send views as fp32, bf16 or fp16")]
Pipeline = Annotated[
    bool | None,
    exchange_option(
        "--pipeline/--no-pipeline", help="Compute the next batch while the last one is pushed: a higher lag"
    ),
]

# ---- machines --------------------------------------------------------------------------------------------------------

Hosts = Annotated[
    str | None, machines_option("--hosts", "-H", help="Machines and their slots, e.g. `a:4,b:4`. Default: localhost")
]
Hostfile = Annotated[Path | None, machines_option("--hostfile", help="Lines of `[user@]host [slots=N] [ssh_port=P]`")]
Include = Annotated[str | None, machines_option("--include", help="Only these hosts and slots: `a:0,2@b`")]
Exclude = Annotated[str | None, machines_option("--exclude", help="Not these hosts and slots: `a:0,2@b`")]
Interface = Annotated[
    list[str] | None,
    machines_option(
        "--interface",
        metavar="[HOST=]NIC",
        help="Network interface to use, of every machine or of one. Default: by route. Repeatable.",
    ),
]
Launcher = Annotated[
    str | None,
    remote_option("--launcher", help="`ssh` (even to this machine), `slurm` or `local`. Default: as needed"),
]
SshPort = Annotated[
    int | None, remote_option("--ssh-port", min=1, max=65535, help="Unless the hostfile or ~/.ssh/config says")
]
SshIdentity = Annotated[Path | None, remote_option("--ssh-identity", exists=True, help="Private key, as `ssh -i`")]
RemotePython = Annotated[
    str | None, remote_option("--remote-python", help="Python there. Default: the same path as here")
]
Chdir = Annotated[str | None, remote_option("--chdir", help="Working directory of the ranks. Default: this one")]
