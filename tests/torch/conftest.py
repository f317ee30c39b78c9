"""What the tests of danaz.torch share: a process that nobody launched, and the server core that it makes for itself."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator

import pytest

import danaz.torch as danaz
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """danaz.torch, as it is in a fresh process that nobody launched."""
    for name in list(os.environ):
        if name.startswith("DANAZ_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(danaz, "_current", None)
    yield
    session = danaz._current
    if session is not None:
        atexit.unregister(session.end_process)
        atexit.unregister(session.close)
        session.close()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[ServerCore]:
    """The server cores that sessions of this process have made, in order."""
    made: list[ServerCore] = []

    def make(settings: ServerSettings) -> ServerCore:
        made.append(ServerCore(settings))
        return made[-1]

    monkeypatch.setattr("danaz.torch.joining.ServerCore", make)
    return made
