"""Ends a command with an error message, and lets a command go on when nobody reads its output any more."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer


def fail(error: object, code: int = 2) -> NoReturn:
    """Print the error on stderr, and end. Exit code 2 says that the same command would fail again."""
    typer.secho(f"danaz: {error}", err=True, fg="red")
    raise typer.Exit(code)


class _Outliving:
    """A stream whose reader may go away. After that, text written to it is lost, but nothing fails."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Any) -> None:
        try:
            act()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # What the stream still holds would fail again when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Within this block, a reader such as `head` that stops reading neither ends the work nor changes the exit code."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Outliving(out), _Outliving(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
