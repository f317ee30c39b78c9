"""The options that commands, configs and the processes of a run share. Each is declared here alone.

A field of :class:`Method` is an option of `danaz launch` and `danaz simulate`, a key of a config, and a setting of
every process. A field of :class:`Training` is a key and a setting; `--set` changes it. A field of :class:`Serving` is
an option of `danaz launch` and a setting. To add one, follow docs/adding-an-option.md.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any

from danaz.options.option import LARGEST_SEED, MOST, MOST_PROCESSES, Option

EXCHANGE, FAILURES, SERVER = "Exchange with the server", "When things fail", "The server"  # panels of --help

WORKERS = Option(
    "Number of workers: machines that train asynchronously, or simulated ones",
    ("--workers", "-n"),
    min=1,
    max=MOST_PROCESSES,
    on_resume="fixed",
)
SEED = Option(
    "Seed of the sample order and, with a config, of the initial parameters and the schedule",
    min=0,
    max=LARGEST_SEED,
    on_resume="fixed",
)


@dataclass(frozen=True)
class Method:
    """How gradients become updates."""

    algorithm: Annotated[
        str,
        Option(
            "Update rule, e.g. dana, nag-asgd, or ssgd for synchronous training; `danaz algorithms` lists them",
            ("--algorithm", "-a"),
            on_resume="fixed",
        ),
    ] = "dana"
    _: KW_ONLY
    sync_period: Annotated[
        int | None,
        Option(
            "Mini-batches between a worker's pushes: a push is the sum of K local steps. Default: the algorithm's own",
            panel=EXCHANGE,
            metavar="K",
            min=1,
            max=MOST,
            on_resume="fixed",
        ),
    ] = None
    pipeline: Annotated[
        bool,
        Option(
            "Compute the next batch while the last one is pushed: this hides the exchange, but raises the lag",
            ("--pipeline/--no-pipeline",),
            EXCHANGE,
            on_resume="fixed",
        ),
    ] = False
    wire: Annotated[
        str,
        Option(
            "How pushes travel: fp32, bf16, fp16, onebit or topk:SHARE, with error feedback",
            panel=EXCHANGE,
            on_resume="fixed",
        ),
    ] = "fp32"
    wire_view: Annotated[str, Option("How views travel: fp32, bf16 or fp16", panel=EXCHANGE, on_resume="fixed")] = (
        "fp32"
    )


@dataclass(frozen=True)
class Training(Method):
    """How a cluster trains: what server and workers must agree on."""

    workers: Annotated[int, WORKERS] = 1
    _: KW_ONLY
    seed: Annotated[int, SEED] = 0
    lr_correction: Annotated[
        bool, Option("Keep DANA's look-ahead exact while lr changes; false: as in the paper", on_resume="fixed")
    ] = True
    wire_warmup_epochs: Annotated[
        float, Option("Epochs of the cluster before pushes are compressed", min=0, on_resume="fixed")
    ] = 0.0
    hyperparameters: Annotated[
        dict[str, Any],
        Option("Hyper-parameters of the algorithm, by the names that `danaz algorithms` lists", on_resume="fixed"),
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What the servers of a live run write, and what they refuse."""

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


# ---- options that stand in several classes, with a default of their own in each --------------------------------------

WARMUP_EPOCHS = Option(
    "Epochs of the cluster over which lr rises from lr / workers to lr; 0: no warm-up", min=0, on_resume="fixed"
)
SHARDS = Option("Number of server processes, each with a slice of the parameters", panel=SERVER, metavar="S", min=1)
SCHEDULE = Option("Order of the workers in a simulation")
DEVICE = Option("`cpu`, `cuda`, or `auto`: a GPU if torch sees one")
RECORD = Option("Record every message, for `danaz replay`")
OVERRIDES = Option(
    "Override a key of the config, e.g. `--set lr=0.05`. Repeatable",
    ("--set",),
    metavar="KEY=VALUE",
    on_resume="fixed",
)
