"""The link of a worker that has no server elsewhere: the server's core runs in the worker's own process."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from danaz.protocol.messages import Reply
from danaz.server.core import ServerCore
from danaz.worker.core import Request, answers
from danaz.worker.link import ServerLostError


class LocalLink:
    """A link to a server core in this process, for a lone worker, or for each rank of an all-reduce world."""

    def __init__(self, core: ServerCore, on_close: Callable[[], object] = lambda: None):
        self.core = core
        self._on_close = on_close

    def exchange(self, request: Request) -> Reply:
        replies = self.core.handle(0, request, time.monotonic())
        for _, reply in replies:
            if answers(reply, request):
                return reply
        raise ServerLostError("the server core of this process waits for other workers, and it can have none")

    def edit(self, displacement: Tensor) -> None:
        """See Link."""
        self.core.edit(displacement)

    def close(self) -> None:
        self._on_close()
