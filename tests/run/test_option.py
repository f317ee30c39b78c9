"""Each option of a run is declared once; the command line and the resume rules follow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer

from danaz.cli.main import app
from danaz.launch.options import LaunchOptions, MachineOptions, TrainingOptions, fixed_names, kept_names
from danaz.run.config import Config, load_config
from danaz.run.option import Option, options_of
from danaz.run.settings import Settings

# What launch.yaml of a run holds that was begun by an earlier version.
KEPT = {
    "collective", "record", "on_worker_failure", "max_restarts", "checkpoint_seconds", "refuse_outliers", "invite",
    "hosts", "hostfile", "include", "exclude", "workers_per_host", "server_host", "server_port", "server_shards",
    "interface", "insecure", "launcher", "ssh_port", "ssh_identity", "remote_python", "chdir",
}  # fmt: skip
FIXED = {
    "config": "the CONFIG",
    "overrides": "--set",
    "algorithm": "--algorithm",
    "sync_period": "--sync-period",
    "wire": "--wire",
    "wire_view": "--wire-view",
    "pipeline": "--pipeline",
    "warmup_epochs": "--warmup-epochs",
    "seed": "--seed",
    "out": "--out",
}


def test_launch_yaml_keeps_the_keys_that_it_always_had() -> None:
    assert kept_names() == KEPT


def test_a_resumed_run_trains_what_it_began() -> None:
    assert fixed_names() == FIXED


@pytest.mark.parametrize(("command", "kind"), [("launch", LaunchOptions), ("doctor", MachineOptions)])
def test_the_command_line_follows_from_the_declarations(command: str, kind: type) -> None:
    params = {param.name: param for param in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]
    declared = options_of(kind)
    assert params.keys() == declared.keys()
    for field in fields(kind):
        option = declared[field.name][1]
        assert params[field.name].default == field.default
        assert option.words(field.name) in ("the CONFIG", *params[field.name].opts)


def test_options_of_training_are_keys_of_a_config_and_settings_of_a_run() -> None:
    names = options_of(TrainingOptions).keys()
    assert names <= Config.model_fields.keys()
    assert names <= {field.name for field in fields(Settings)}


def test_settings_have_the_values_of_the_config() -> None:
    changed = ["wire=onebit", "wire_view=bf16", "pipeline=true", "sync_period=3", "workers=7", "seed=5", "gap=every:9"]
    config = load_config("configs/quadratic.yaml", [*changed, "wire_warmup_epochs=2", "lr_schedule.warmup_epochs=4"])
    settings = Settings.of(config, schedule="live", collective="torch")
    assert (settings.wire, settings.wire_view, settings.pipeline) == ("onebit", "bf16", True)
    assert (settings.sync_period, settings.workers, settings.seed, settings.gap_every) == (3, 7, 5, 9)
    assert (settings.wire_warmup_epochs, settings.warmup_epochs) == (2.0, 4.0)
    assert (settings.schedule, settings.collective, settings.digest) == ("live", "torch", config.digest())


def test_a_field_without_a_declaration_is_an_error() -> None:
    @dataclass
    class Forgotten:
        well: Annotated[int, Option("Said")] = 1
        ill: int = 2

    Forgotten.__annotations__ = {"well": Annotated[int, Option("Said")], "ill": int}
    with pytest.raises(TypeError, match=r"Forgotten\.ill should be Annotated"):
        options_of(Forgotten)
