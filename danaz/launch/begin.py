"""Makes a run that is ready to start out of the options of `danaz launch`: a new run, or one that is resumed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from danaz.launch.options import LaunchOptions, kept_names, keys_of_launch_yaml
from danaz.launch.prepare import Cluster, Launch, LaunchError, name_of, prepare_config, prepare_script
from danaz.launch.reach import parse_environment
from danaz.launch.resume import (
    OPTIONS,
    check_all_there,
    check_begun,
    check_checkpoints,
    check_variables,
    checked,
    merge_options,
    read_options,
    read_settings,
)
from danaz.options.option import newer_names
from danaz.options.shared import Training
from danaz.run.config import Config, load_config, read_hyperparameters
from danaz.run.lock import claimed_run_folder, free_run_folder, locked_run_folder
from danaz.run.settings import Settings
from danaz.worker.group import choose_collective


def prepare(options: LaunchOptions, named: Collection[str], command: Sequence[str]) -> tuple[Launch, str]:
    """Return the run that the options ask for, and a sentence on the collective that was chosen.

    This writes and claims nothing. ``named`` are the options given on the command line. Raises ValueError or
    RuntimeError, which say what is wrong.
    """
    if options.resume is not None:
        return _prepare_resumed(options, named, command)
    task = _task(options, command)
    return _ready(options, task, command, free_run_folder(options.out, name_of(task, command)))


@contextmanager
def prepared(options: LaunchOptions, named: Collection[str], command: Sequence[str]) -> Iterator[tuple[Launch, str]]:
    """Like ``prepare``, but hold the run folder for this process alone during the block."""
    if options.resume is not None:
        check_begun(options.resume)
        with locked_run_folder(options.resume):
            yield _prepare_resumed(options, named, command)
        return
    task = _task(options, command)
    with claimed_run_folder(options.out, name_of(task, command)) as run:
        yield _ready(options, task, command, run)


def _task(options: LaunchOptions, command: Sequence[str]) -> Config | Settings:
    """Return what a new run trains: a config, or the settings of a script."""
    if (options.config is None) == (not command):
        raise LaunchError("give either a CONFIG or, after --, a command such as: -- python train.py")
    if options.config is not None:
        if options.warmup_epochs is not None or options.seed is not None:
            raise LaunchError("a config has these keys: use --set lr_schedule.warmup_epochs=… and --set seed=…")
        return load_config(options.config, options.overrides or (), options.training, options.hyperparameter or ())
    if options.overrides:
        raise LaunchError("--set changes a config, and a script has none; pass its own arguments after --")
    training = {"algorithm": Training.algorithm, **options.training}
    return Settings(
        **training,
        hyperparameters=read_hyperparameters(options.hyperparameter or ()),
        warmup_epochs=options.warmup_epochs or 0.0,
        seed=options.seed or 0,
    )


def _prepare_resumed(options: LaunchOptions, named: Collection[str], command: Sequence[str]) -> tuple[Launch, str]:
    run = options.resume
    assert run is not None
    if command:
        raise LaunchError("--resume goes on with what the run began; leave out the command after --")
    keys = keys_of_launch_yaml()
    given = {key: getattr(options, name) for key, name in keys.items()}
    values = read_options(run)
    kept = checked(run / OPTIONS, LaunchOptions, options.by_field(values))
    check_all_there(run / OPTIONS, values, sorted(kept_names() - newer_names(LaunchOptions)))
    merged = merge_options(run, given, [key for key, name in keys.items() if name in named and name != "resume"])
    merged = options.by_field(merged | {name: given[name] for name in ("variables", "env_file")})
    check_variables(kept.variables or (), parse_environment(options.variables or (), options.env_file))
    paths = {name: merged[name] and Path(merged[name]) for name in ("hostfile", "ssh_identity")}
    task, kept_command = read_settings(run)
    ready, why = _ready(LaunchOptions(**{**merged, **paths, "resume": run}), task, kept_command or [], run)
    check_checkpoints(run, kept.server_host, merged["server_host"], ready.shards_elsewhere)
    return ready, why


def _ready(options: LaunchOptions, task: Config | Settings, command: Sequence[str], run: Path) -> tuple[Launch, str]:
    hosts = options.find_hosts()
    reach = options.reach(hosts)
    collective, why = choose_collective(options.collective)
    cluster = Cluster(hosts, options.workers_per_host, collective, reach)
    if isinstance(task, Config):
        ready = prepare_config(task, cluster, run, options)
    else:
        ready = prepare_script(command, task, cluster, run, options)
    return replace(ready, options=options.kept(reach.env)), why
