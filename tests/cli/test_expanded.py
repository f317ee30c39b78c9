"""A command whose options are the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from danaz.cli.options import expanded
from danaz.options.option import Option, given


@dataclass(frozen=True)
class Cake:
    layers: Annotated[int | None, Option("Layers", ("--layers", "-l"), min=1)] = None
    icing: Annotated[bool, Option("With icing")] = False


def bake(*words: str) -> tuple[int, list[tuple[str, Cake]]]:
    baked: list[tuple[str, Cake]] = []
    app = typer.Typer()

    @app.command()
    @expanded
    def command(flavour: Annotated[str, typer.Argument()], cake: Cake) -> None:
        baked.append((flavour, cake))

    return CliRunner().invoke(app, words).exit_code, baked


@pytest.mark.parametrize(
    ("words", "cake"),
    [
        (["lemon"], Cake()),
        (["lemon", "-l", "3", "--icing"], Cake(3, True)),
    ],
)
def test_the_command_gets_its_options_as_one_object(words: list[str], cake: Cake) -> None:
    assert bake(*words) == (0, [("lemon", cake)])


@pytest.mark.parametrize("words", [[], ["lemon", "--layers", "0"], ["lemon", "--candles"]])
def test_typer_checks_the_options(words: list[str]) -> None:
    assert bake(*words) == (2, [])


def test_given_returns_what_the_user_has_set() -> None:
    assert given(Cake(2, True), {"layers"}) == {"layers": 2}
    assert given(Cake(), {"layers", "icing"}) == {"icing": False}
