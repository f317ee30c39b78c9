"""The YAML of an experiment: it says what is trained, how fast it learns, and by whom.

``load_config`` reads a file and ``--set key=value`` overrides into a frozen :class:`Config`. If anything is wrong, it
raises one :class:`ConfigError` that names the file, the key, the value given and what is allowed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from danaz.files.plain_yaml import YamlError, parse_yaml
from danaz.options.option import MOST, MOST_PROCESSES, Option, declared, newer_names
from danaz.options.shared import DEVICE, SCHEDULE, WARMUP_EPOCHS, Training, fixed
from danaz.run.schedules import SCHEDULE_FORMS, SCHEDULES


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, what was given and what is allowed."""


def suggest(given: object, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the allowed word nearest to ``given``; nothing if none is near."""
    nearest = difflib.get_close_matches(str(given), list(allowed), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _number(value: object) -> object:
    if isinstance(value, bool):  # pydantic would read `true` as 1
        raise ValueError("should be a number, not true or false")
    return value


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("should be a number, a word, or true or false")
    if isinstance(value, int | float) and not (isfinite(value) and abs(value) <= 2.0**63):
        raise ValueError("should be a finite number, of 64 bits at most")
    return value


def _gap(value: object) -> object:
    if isinstance(value, bool):
        return "on" if value else "off"
    if not re.fullmatch("on|off|every:[1-9][0-9]*", str(value)):
        raise ValueError(f"should be on, off or every:K with K >= 1{suggest(value, ('on', 'off', 'every:10'))}")
    return value


Float = Annotated[float, BeforeValidator(_number)]
Scalar = Annotated[bool | int | float | str, BeforeValidator(_scalar)]
Gap = Annotated[str, BeforeValidator(_gap)]

# Fields that may differ from machine to machine, or only label a run. The digest leaves them out.
LOCAL: dict[str, Any] = {"local": True}


class _Checked(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: object, info: ValidationInfo) -> object:
        is_number = cls.model_fields[info.field_name or ""].annotation in (int, float, int | None)
        return _number(value) if is_number else value


class LrSchedule(_Checked, frozen=True):
    """Steps of the learning rate, and the warm-up of a cluster."""

    milestones: tuple[Float, ...] = Field(
        default=(), description="epochs at which lr is multiplied by factor, increasing"
    )
    factor: float = Field(default=0.1, gt=0, description="what lr is multiplied by at each milestone")
    warmup_epochs: Annotated[float, WARMUP_EPOCHS] = 5.0

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in pairwise((0.0, *milestones))):
            raise ValueError("should be epochs above 0, each larger than the one before")
        return milestones


OptimizerOption = bool | float | tuple[float, float]
OPTIMIZER = fixed("optimizer of torch: sgd, adam, adamw, nadam, rmsprop or adagrad", since="0.2")
OPTIMIZER_OPTIONS = fixed("keyword arguments of torch's optimizer, such as betas; not of sgd", since="0.2")


class _Task:
    """What is trained, and how fast it learns."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="label of the run, part of its folder's name: letters, digits, '.', '_' and '-'",
        json_schema_extra=LOCAL,
    )
    workload: str | None = Field(None, description="a built-in workload, e.g. digits; or give data and model instead")
    data: str | None = Field(None, description="torchvision.<Dataset>, or package.module:function for (train, test)")
    model: str | None = Field(None, description="torchvision.<model>, or package.module:callable for a module")
    data_dir: str | None = Field(None, description="folder that holds the data set", json_schema_extra=LOCAL)
    augment: bool | None = Field(None, description="random crops and flips of training images; default: the workload's")
    batch_size: int = Field(ge=1, le=MOST, description="samples of one update: per worker, shared by its ranks")
    epochs: int = Field(ge=1, le=MOST, description="passes over the training data by the whole cluster")
    lr: float = Field(gt=0, description="learning rate, as tuned on one worker")
    optimizer: Annotated[Literal["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad"], OPTIMIZER] = "sgd"
    optimizer_options: Annotated[dict[str, OptimizerOption], OPTIMIZER_OPTIONS] = Field(default_factory=dict)
    momentum: float = Field(0.9, gt=-1, lt=1, description="Nesterov momentum of sgd, above -1 and below 1")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty, added to the gradient; with adamw, decoupled")
    lr_schedule: LrSchedule = Field(default_factory=LrSchedule, description="milestones, factor and warmup_epochs")


class Config(_Checked, Training, _Task, frozen=True):
    """One experiment. Build it with :func:`load_config`; the fields are the keys of the YAML.

    In a YAML that danaz writes, the keys come in the order _Task, Training, Config.
    """

    hyperparameters: Annotated[dict[str, Scalar], declared(Training)["hyperparameters"][1]] = Field(
        default_factory=dict
    )
    schedule: Annotated[str, SCHEDULE] = "block-random"
    gap: Gap = Field(
        "on",
        description="measure the gap of each update (on), of every K-th (every:K) or of none (off)",
        json_schema_extra=LOCAL,
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="tf32: shorter factors in matrix products on a GPU; bf16: mixed precision by autocast"
    )
    channels_last: bool = Field(False, description="keep images and convolutions in channels-last memory format")
    device: Annotated[Literal["auto", "cpu", "cuda"], DEVICE] = Field("auto", json_schema_extra=LOCAL)
    num_workers: int = Field(
        0, ge=0, le=MOST_PROCESSES, description="loading processes of each rank's DataLoader", json_schema_extra=LOCAL
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=MOST_PROCESSES,
        description="CPU threads of each rank; default: torch's choice",
        json_schema_extra=LOCAL,
    )

    @field_validator("wire")
    @classmethod
    def _codec_of_pushes(cls, name: str) -> str:
        from danaz.vectors.codecs import push_codec  # with torch, which a config alone does not need

        return push_codec(name).name

    @field_validator("wire_view")
    @classmethod
    def _codec_of_views(cls, name: str) -> str:
        from danaz.vectors.codecs import view_codec

        return view_codec(name).name

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        form, _, argument = value.partition(":")
        if value not in SCHEDULES and not (form in SCHEDULE_FORMS and argument):
            known = (*SCHEDULES, *SCHEDULE_FORMS.values())
            raise ValueError(f"should be one of {', '.join(known)}{suggest(value, SCHEDULES)}")
        return value

    @model_validator(mode="after")
    def _options_of_the_optimizer(self) -> Config:
        keys = {"lr", "weight_decay"} & self.optimizer_options.keys()
        if keys:
            raise ValueError(f"optimizer_options holds {', '.join(sorted(keys))}, which has a key of its own")
        if self.optimizer == "sgd" and self.optimizer_options:
            raise ValueError(
                "optimizer_options are not for sgd, which is torch's SGD with nesterov=True: set the key momentum"
            )
        return self

    @model_validator(mode="after")
    def _one_workload(self) -> Config:
        given = [key for key in ("workload", "data", "model") if getattr(self, key) is not None]
        if given not in (["workload"], ["data", "model"]):
            found = ", ".join(f"{key} = {getattr(self, key)!r}" for key in given) or "none of the three"
            raise ValueError(f"give either the key workload, or both data and model; found {found}")
        return self

    def digest(self) -> str:
        """Return the SHA-256 (hex) of what server and workers must agree on.

        It does not depend on paths and other matters of one machine. Nor does it depend on a key that an earlier
        version does not know, as long as that key has its default.
        """
        fields = type(self).model_fields
        local = {name for name, field in fields.items() if field.json_schema_extra == LOCAL}
        newer = {
            name
            for name in newer_names(type(self))
            if getattr(self, name) == fields[name].get_default(call_default_factory=True)
        }
        shared = self.model_dump(mode="json", exclude=local | newer)
        canonical = json.dumps(shared, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    options: Mapping[str, object] | None = None,
    hyperparameters: Sequence[str] = (),
) -> Config:
    """Read and check a YAML file.

    Args:
        path: the file. ``name`` defaults to its stem.
        overrides: ``key=value`` each, the value in YAML: ``lr=0.1``, ``lr_schedule.factor=0.2`` or
            ``lr_schedule={milestones: [2, 3]}``. A mapping is merged into the file's, anything else replaces it.
        options: values of keys that have an option of their own on the command line, such as ``--algorithm``. They
            replace those of the overrides.
        hyperparameters: ``name=value`` each, which replace single ones among the key ``hyperparameters``.

    Raises:
        ConfigError: the file is missing or is not a mapping, or a key or value is not allowed.
    """
    path = Path(path)
    values = {"name": path.stem, **_read_mapping(path)}
    origin = {}  # dotted key -> the override that set it, for the error message
    for override in overrides:
        key, value = _parse_assignment("--set", override, "lr=0.1")
        _merge(values, key.split("."), value, override)
        origin[key] = f"--set {override}"
    for key, value in (options or {}).items():
        values[key] = value
        origin[key] = f"--{key.replace('_', '-')} {value}"
    for name, value in read_hyperparameters(hyperparameters).items():
        _merge(values, ["hyperparameters", name], value, f"hyperparameters.{name}={value}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem, path, origin) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from None


def read_hyperparameters(given: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Read what ``--hyperparameter`` was given: NAME=VALUE each, the value in YAML. Raises ConfigError."""
    values: dict[str, bool | int | float | str] = {}
    for text in given:
        name, value = _parse_assignment("--hyperparameter", text, "outer=dana")
        try:
            values[name] = TypeAdapter(Scalar).validate_python(value)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"--hyperparameter {text}: the value {reason}") from None
    return values


def _read_mapping(path: Path) -> dict[str, Any]:
    if path.suffix == ".py":
        raise ConfigError(
            f"{path} is a Python script, not the YAML of an experiment; start it by: danaz launch -- python {path}"
        )
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = [str(other) for other in sorted(path.parent.glob("*.yaml"))]
        raise ConfigError(f"{path}: no such config file{suggest(path, others)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the config: {error}") from None
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected a mapping of keys to values, like 'lr: 0.1' on lines of their own")
    return values


def _parse_assignment(option: str, text: str, example: str) -> tuple[str, Any]:
    """Read the key=value that an option of the command line was given, the value in YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} {text}: expected key=value, for example {option} {example}")
    try:
        return key.strip(), parse_yaml(value)
    except YamlError as error:
        raise ConfigError(f"{option} {text}: the value is not valid YAML: {error}") from None


def _merge(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    """Set ``values[keys[0]][keys[1]]…``; a mapping is merged into the mapping it meets."""
    first, *rest = keys
    if rest or (isinstance(value, dict) and isinstance(values.get(first), dict)):
        inner = values.get(first) or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {first} = {inner!r} holds no keys, so {'.'.join(rest)} cannot be set")
        values[first] = inner = dict(inner)
        for key, item in [(rest, value)] if rest else [([name], item) for name, item in value.items()]:
            _merge(inner, key, item, override)
    else:
        values[first] = value


def _explain(problem: Mapping[str, Any], path: Path, origin: Mapping[str, str]) -> str:
    """Return one pydantic problem as a sentence: where it is, the key, the value given, and what is allowed."""
    location, given = problem["loc"], _SHORT.repr(problem["input"])
    key = ".".join(map(str, location))
    sources = [said for name, said in origin.items() if f"{key}.".startswith(f"{name}.")]
    where = f"{path}, {sources[-1]}" if sources else str(path)
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    if not key:  # about several keys
        return f"{where}: {message}"
    fields = _fields_beside(location)
    name = next((part for part in reversed(location) if isinstance(part, str) and part in fields), None)
    match problem["type"]:
        case "extra_forbidden":
            known = ", ".join(sorted(fields))
            return f"{where}: unknown key {key!r} (= {given}){suggest(location[-1], fields) or '.'} Known keys: {known}"
        case "missing":
            return f"{where}: the key {key!r} is missing ({_described(fields[location[-1]])})"
        case "literal_error":
            message += suggest(problem["input"], get_args(fields[location[-1]].annotation))
    described = "" if name is None else f" ({_described(fields[name])})"
    return f"{where}: {key} = {given} {message}{described}"


def _described(field: FieldInfo) -> str:
    """Return the description of a key, or the help of its option as words within a sentence."""
    options = [part for part in field.metadata if isinstance(part, Option)]
    return f"{options[0].help[:1].lower()}{options[0].help[1:]}" if options else field.description or ""


def _fields_beside(location: Sequence[str | int]) -> dict[str, FieldInfo]:
    """Return the fields of the mapping that holds a pydantic location."""
    return LrSchedule.model_fields if location[0] == "lr_schedule" and len(location) > 1 else Config.model_fields


# Like `repr`, but a value of any size or depth gives one line.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
