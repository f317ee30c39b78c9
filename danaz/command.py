"""How every command says that it cannot go on."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(error: object) -> NoReturn:
    """Say why on stderr, and end with exit code 2."""
    typer.secho(f"danaz: {error}", err=True, fg="red")
    raise typer.Exit(2)
