"""How every command says that it cannot go on."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(error: object, code: int = 2) -> NoReturn:
    """Say why on stderr, and end. Exit code 2 says that to try again the same would be no use."""
    typer.secho(f"danaz: {error}", err=True, fg="red")
    raise typer.Exit(code)
