"""The options that commands, configs and the processes of a run share. Each is declared here alone.

A field of :class:`Method` is an option of `danaz launch` and `danaz simulate`, a key of a config, and a setting of
every process. A field of :class:`Training` is a key and a setting; `--set` changes it. A field of :class:`Serving` or
:class:`Servers` is an option of `danaz launch` and a setting. To add one, follow docs/adding-an-option.md.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from danaz.options.option import LARGEST_SEED, MOST, MOST_PROCESSES, Option

EXCHANGE, FAILURES, SERVER = "Exchange with the server", "When things fail", "The server"  # panels of --help

fixed = partial(Option, on_resume="fixed")  # what a run trains, it trains to its end

WORKERS = fixed(
    "Number of workers: machines that train asynchronously, or simulated ones",
    ("--workers", "-n"),
    min=1,
    max=MOST_PROCESSES,
)
SEED = fixed(
    "Seed of the sample order, and of the initial parameters and the schedule of a config", min=0, max=LARGEST_SEED
)


@dataclass(frozen=True)
class Method:
    """How gradients become updates."""

    algorithm: Annotated[
        str,
        fixed(
            "Update rule, e.g. dana, nag-asgd, or ssgd for synchronous training; `danaz algorithms` lists them",
            ("--algorithm", "-a"),
        ),
    ] = "dana"
    _: KW_ONLY
    sync_period: Annotated[
        int | None,
        fixed(
            "Mini-batches between a worker's pushes: a push is the sum of K local steps. Default: the algorithm's own",
            panel=EXCHANGE,
            metavar="K",
            min=1,
            max=MOST,
        ),
    ] = None
    pipeline: Annotated[
        bool,
        fixed(
            "Compute the next batch while the last one is pushed: this hides the exchange, but raises the lag",
            ("--pipeline/--no-pipeline",),
            EXCHANGE,
        ),
    ] = False
    wire: Annotated[
        str,
        fixed("How pushes travel: fp32, bf16, fp16, onebit or topk:SHARE, with error feedback", panel=EXCHANGE),
    ] = "fp32"
    lr_scaling: Annotated[
        Literal["auto", "linear", "sqrt", "none"],
        fixed(
            "Factor of lr under ssgd with N workers: linear (N), sqrt (the root of N) or none (1); "
            "auto: linear for SGD, sqrt for optimizers with adaptive steps",
            since="0.2",
        ),
    ] = "auto"
    wire_view: Annotated[str, fixed("How views travel: fp32, bf16 or fp16", panel=EXCHANGE)] = "fp32"


@dataclass(frozen=True)
class Training(Method):
    """How a cluster trains: what server and workers must agree on."""

    workers: Annotated[int, WORKERS] = 1
    _: KW_ONLY
    seed: Annotated[int, SEED] = 0
    lr_correction: Annotated[bool, fixed("Keep DANA's look-ahead exact while lr changes; false: as in the paper")] = (
        True
    )
    wire_warmup_epochs: Annotated[float, fixed("Epochs of the cluster before pushes are compressed", min=0)] = 0.0
    hyperparameters: Annotated[
        dict[str, Any],
        fixed("Hyper-parameters of the algorithm, by the names that `danaz algorithms` lists"),
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a server writes, and what it refuses."""

    checkpoint_s: Annotated[
        float,
        Option(
            "Seconds between checkpoints; 0: write none",
            ("--checkpoint-seconds",),
            FAILURES,
            metavar="SECONDS",
            min=0,
            key="checkpoint_seconds",
        ),
    ] = 30.0
    refuse_outliers: Annotated[
        bool,
        Option(
            "Refuse pushes that are far larger than the cluster's others, instead of only reporting them",
            panel=FAILURES,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Servers(Serving):
    """How many servers a live run has, and what all of them do."""

    server_shards: Annotated[
        int, Option("Number of server processes, each with a slice of the parameters", panel=SERVER, metavar="S", min=1)
    ] = 1


# ---- options that stand in several classes, with a default of their own in each --------------------------------------

WARMUP_EPOCHS = fixed("Epochs of the cluster over which lr rises from lr / workers to lr; 0: no warm-up", min=0)
SCHEDULE = Option("Order of the workers in a simulation")
DEVICE = Option("`cpu`, `cuda`, or `auto`: a GPU if torch sees one")
RECORD = Option("Record every message, for `danaz replay`")
OVERRIDES = fixed("Override a key of the config, e.g. `--set lr=0.05`. Repeatable", ("--set",), metavar="KEY=VALUE")
HYPERPARAMETER = fixed(
    "Hyper-parameter of the algorithm, e.g. `outer=dana`; `danaz algorithms` lists them. Repeatable",
    metavar="NAME=VALUE",
    since="0.2",
)
