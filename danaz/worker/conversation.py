"""What a worker says to its server: one request at a time, and how it goes on if the server refuses one."""

from __future__ import annotations

from time import perf_counter
from typing import TypeVar

import torch

from danaz.protocol.messages import Join, Leave, Parameters, Pull, Push, Refusal, Reply
from danaz.protocol.refusals import COMPLETE
from danaz.worker.core import Request, WorkerCore
from danaz.worker.link import Link

Answer = TypeVar("Answer", bound=Reply)


class RefusedError(RuntimeError):
    """The server refuses this worker."""


class Conversation:
    """The worker core, which makes the requests and takes the replies, and the link that carries them."""

    def __init__(self, core: WorkerCore, link: Link):
        self.core = core
        self.link = link
        self.came_late = False  # whether the run was over before this worker came, or came back
        self.refused_pushes = 0
        self.ready_at = perf_counter()  # when the last request was ready to be sent; the device computed until then

    def ask(self, request: Request, expected: type[Answer]) -> Answer:
        """Send ``request`` and return its answer. If it is refused, do what the refusal asks for first.

        If the server gave this worker up while it was away, or was restarted, the worker joins again. The view that it
        gets then also answers a push or a pull. If the run is complete, the answer is that nothing is left to do.

        Raises RefusedError if the server wants no more of this worker, or answers with anything but ``expected``.
        """
        reply = self.send(request)
        while isinstance(reply, Refusal):
            if isinstance(request, Join) and 0 < reply.newest < self.core.role.incarnation:
                request = self.core.renew(request)  # as a newer incarnation
                reply = self.send(request)
            elif reply.reason == COMPLETE and isinstance(request, (Join, Push, Pull)):
                self.came_late = True
                reply = _nothing_to_do(reply, self.core)
            elif reply.rejoin and not isinstance(request, Join):
                reply = self.send(self.core.join())
                if isinstance(request, Leave) and isinstance(reply, Parameters):
                    _check_still_over(request, reply)
                    request = self.core.renew(request)
                    reply = self.send(request)
            else:
                raise RefusedError(f"the server refused this worker's {_name(request)}: {reply.reason}")
        if not isinstance(reply, expected):
            raise RefusedError(f"the server answered this worker's {_name(request)} with {type(reply).__name__}")
        if isinstance(request, Push) and isinstance(reply, Parameters):
            self.refused_pushes += not (reply.applied or self.came_late)
        return reply

    def send(self, request: Request) -> Reply:
        """Send ``request`` once it is complete, and return its reply, which the core has received."""
        request = self.core.complete(request)
        self.ready_at = perf_counter()
        reply = self.link.exchange(request)
        self.core.receive(reply)
        return reply


def _name(request: Request) -> str:
    return type(request).__name__.lower()


def _check_still_over(leave: Leave, joined: Parameters) -> None:
    """Raise RefusedError if the worker left because no batches were left, and the restarted server has some again."""
    if leave.done and not leave.stop and not joined.done:
        raise RefusedError(
            "the server went back to before the end of the run, and this process has left the run; start it anew"
        )


def _nothing_to_do(refusal: Refusal, core: WorkerCore) -> Parameters:
    """Return what the server would have said to a worker that was there at the end of the run."""
    return Parameters(
        request=refusal.request,
        version=core.version,
        applied=False,
        refused=refusal.reason,
        leases=(),
        done=True,
        epoch=core.epoch,
        lag=0,
        gap=None,
        view=torch.empty(0),
    )
