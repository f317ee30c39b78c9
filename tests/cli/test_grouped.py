"""A command whose options are the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from danaz.cli.grouped import given, takes_options


@dataclass(frozen=True)
class Cake:
    flavour: Annotated[str, typer.Argument()]
    layers: Annotated[int | None, typer.Option("--layers", "-l", min=1)] = None
    icing: Annotated[bool, typer.Option("--icing")] = False


def bake(*words: str) -> tuple[int, list[Cake]]:
    baked: list[Cake] = []
    app = typer.Typer()
    app.command()(takes_options(Cake)(baked.append))
    return CliRunner().invoke(app, words).exit_code, baked


@pytest.mark.parametrize(
    ("words", "cake"),
    [
        (["lemon"], Cake("lemon")),
        (["lemon", "-l", "3", "--icing"], Cake("lemon", 3, True)),
    ],
)
def test_the_command_gets_its_options_as_one_object(words: list[str], cake: Cake) -> None:
    assert bake(*words) == (0, [cake])


@pytest.mark.parametrize("words", [[], ["lemon", "--layers", "0"], ["lemon", "--candles"]])
def test_typer_checks_them(words: list[str]) -> None:
    assert bake(*words) == (2, [])


def test_only_what_the_user_has_given_counts() -> None:
    assert given(Cake("lemon"), {"flavour", "layers"}) == {"flavour": "lemon"}
    assert given(Cake("lemon", 2, True), {"layers"}) == {"layers": 2}
