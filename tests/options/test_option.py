"""Each option of a run is declared once. Its type, default, help, limits and resume rule are the same everywhere."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any

import pytest
import typer

from danaz.cli.main import app
from danaz.cli.simulate import SimulateOptions
from danaz.launch.options import LaunchOptions, MachineOptions, TrainingOptions, fixed_names, kept_names
from danaz.options.option import Option, declared, newer_names, options_of, overriding
from danaz.options.shared import Method, Servers, Serving, Training
from danaz.run.config import Config, load_config
from danaz.run.settings import Settings
from danaz.server.settings import CommonSettings, ServerSettings

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
QUADRATIC = "configs/quadratic.yaml"


def params_of(command: str) -> dict[str, Any]:
    """The parameters of a command, as Typer shows them."""
    return {param.name: param for param in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]


def defaults_of(kind: type) -> dict[str, Any]:
    """Name -> default of each field of a dataclass."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
    }


def test_launch_yaml_keeps_the_keys_that_it_always_had() -> None:
    assert kept_names() - newer_names(LaunchOptions) == KEPT


def test_a_resumed_run_trains_what_it_began() -> None:
    newer = newer_names(LaunchOptions)
    assert {name: words for name, words in fixed_names().items() if name not in newer} == FIXED


@pytest.mark.parametrize(("command", "kind"), [("launch", LaunchOptions), ("doctor", MachineOptions)])
def test_the_command_line_follows_from_the_declarations(command: str, kind: type) -> None:
    params, options = params_of(command), options_of(kind)
    assert params.keys() == options.keys()
    for field in fields(kind):
        option = options[field.name][1]
        assert params[field.name].default == field.default
        assert option.words(field.name) in ("the CONFIG", *params[field.name].opts)


def test_options_of_training_are_keys_of_a_config_and_settings_of_a_run() -> None:
    names = options_of(TrainingOptions).keys()
    assert names <= Config.model_fields.keys()
    assert names <= {field.name for field in fields(Settings)}


@pytest.mark.parametrize("name", options_of(Training))
class TestTraining:
    """Each field of Training, with nothing but its declaration."""

    def test_is_a_key_of_a_config(self, name: str) -> None:
        type_, option = options_of(Training)[name]
        key = Config.model_fields[name]
        assert key.get_default(call_default_factory=True) == defaults_of(Training)[name]
        assert option in key.metadata
        assert key.annotation == type_ or name == "hyperparameters"  # of which a config also checks the values

    @pytest.mark.parametrize("kind", [Settings, ServerSettings])
    def test_is_a_setting_of_every_process(self, name: str, kind: type) -> None:
        if (kind, name) == (Settings, "algorithm"):
            assert Settings().algorithm == "baseline", "a process that nobody launched trains alone"
            return
        assert declared(kind)[name] == options_of(Training)[name]
        assert defaults_of(kind)[name] == defaults_of(Training)[name]

    def test_is_fixed_for_a_resumed_run(self, name: str) -> None:
        assert options_of(Training)[name][1].on_resume == "fixed"


@pytest.mark.parametrize("name", options_of(Method))
@pytest.mark.parametrize(("command", "kind"), [("launch", LaunchOptions), ("simulate", SimulateOptions)])
def test_a_method_is_an_option_that_overrides_the_config(command: str, kind: type, name: str) -> None:
    type_, option = options_of(Method)[name]
    assert options_of(kind)[name] == (type_ | None, option)
    param = params_of(command)[name]
    assert (param.default, param.help) == (None, option.help)
    assert fixed_names()[name] == option.words(name)


@pytest.mark.parametrize("name", options_of(Servers))
def test_an_option_of_servers_is_an_option_of_launch_and_a_setting(name: str) -> None:
    option = options_of(Servers)[name]
    core = [ServerSettings] if name in options_of(Serving) else []
    for kind in (LaunchOptions, Settings, *core):
        assert declared(kind)[name] == option
        assert defaults_of(kind)[name] == defaults_of(Servers)[name]
    assert (option[1].key or name) in kept_names()


def test_every_setting_reaches_the_processes_and_the_server() -> None:
    """Each has a value here that is not its default."""
    others: dict[type, Any] = {str: "other", int: 7, float: 7.5, type(None): 7, dict: {"a": 1}}
    changed = {
        name: not value if isinstance(value, bool) else others[type(value)]
        for name, value in defaults_of(Settings).items()
    }
    settings = Settings.from_json(Settings(**changed).to_json())
    assert {field.name: getattr(settings, field.name) for field in fields(Settings)} == changed
    server = settings.for_server()
    assert {field.name: getattr(server, field.name) for field in fields(CommonSettings)}.items() <= changed.items()
    assert server.shards == changed["server_shards"]


def test_settings_have_the_values_of_the_config() -> None:
    changed = ["wire=onebit", "wire_view=bf16", "pipeline=true", "sync_period=3", "workers=7", "seed=5", "gap=every:9"]
    config = load_config(QUADRATIC, [*changed, "wire_warmup_epochs=2", "lr_schedule.warmup_epochs=4"])
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


def test_a_class_overrides_the_options_of_another() -> None:
    @dataclass
    class Oven:
        degrees: int = 180

    Oven.__annotations__ = {"degrees": Annotated[int, Option("Heat", min=0)]}

    @dataclass
    @overriding(Oven)
    class Asked:
        pass

    assert options_of(Asked) == {"degrees": (int | None, Option("Heat", min=0))}
    assert Asked().degrees is None  # type: ignore[attr-defined]
    assert Asked(degrees=200).degrees == 200  # type: ignore[call-arg, attr-defined]
