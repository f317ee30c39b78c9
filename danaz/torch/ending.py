"""How a process of a run ends where its script does not say so: it left its loop, exits in mid-run or never trained."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Protocol

from torch.utils.hooks import RemovableHandle

from danaz.run.settings import RankInfo
from danaz.torch.loop import Loop
from danaz.torch.optimizer import DistributedOptimizer

UNFINISHED = 64  # exit code of a process that ends in the midst of a run, or has not trained (EX_USAGE)


class Part(Protocol):
    """One process's part in a run, as far as its ending must know it."""

    place: RankInfo
    loop: Loop
    finished: bool

    @property
    def optimizer(self) -> DistributedOptimizer:
        """The wrapped one. Raises NotInitializedError if there is none."""

    @property
    def has_optimizer(self) -> bool:
        """Whether the script has wrapped its optimizer."""

    @property
    def has_begun(self) -> bool:
        """Whether this process has entered the run."""

    @property
    def came_late(self) -> bool:
        """Whether the run was over before."""

    def stop(self, reason: str) -> None:
        """End the run for every worker, in good order."""


class Ending:
    """Sees to it that the end of one process's part in a run is in good order, or does not look like a success.

    A loop that is left by ``break`` cannot be told from one that an exception leaves, until the script goes on.
    """

    def __init__(self, session: Part, close: Callable[[], None]):
        self._session = session
        self._close = close
        self._pid = os.getpid()
        self._watches: list[RemovableHandle] = []  # on the model, once its loop was left

    def watch(self) -> None:
        """The loop over epochs was left: from now on, look whether the script uses the model behind it."""
        session = self._session
        if session.finished or not session.has_begun:
            return
        for module in session.optimizer.flat.model.modules():
            self._watches.append(module.register_forward_pre_hook(lambda *_: self.end_if_left()))
            watch = module.register_state_dict_pre_hook(lambda *_: self.end_if_left())  # type: ignore[no-untyped-call]
            self._watches.append(watch)

    def stop_watching(self) -> None:
        """The model is the trained one."""
        for watch in self._watches:
            watch.remove()
        self._watches.clear()

    def end_if_left(self) -> None:
        """End the run if the script has left its loop, and goes on without it and without an exception."""
        session = self._session
        if session.loop.was_left and session.has_begun and not session.finished and sys.exc_info()[1] is None:
            _say(f"{self._left}; the run ends here for every worker. To say so, and why, call danaz.stop(reason) first")
            session.stop(self._left)

    @property
    def _left(self) -> str:
        return f"the script left its loop in epoch {self._session.loop.reached} of {self._session.loop.count}"

    def what_is_missing(self) -> str:
        """What this process should have done before it ends, and has not; nothing if it has."""
        session = self._session
        if session.finished or session.came_late:
            return ""
        if session.has_begun:
            return (
                f"{self._left} and ended before the run was over. To end a run early, call danaz.stop(reason) in the "
                "loop"
            )
        if not session.place.launched:
            return ""  # a process alone may do without training
        calls = {
            "danaz.DistributedOptimizer(optimizer, model)": session.has_optimizer,
            "danaz.epochs(N)": session.loop.count is not None,
            "danaz.shard(loader, epoch)": False,
        }
        missing = ", ".join(call for call, is_made in calls.items() if not is_made)
        return f"the script ended without training: it calls danaz.init(), but never came to {missing}"

    def end_process(self) -> None:
        """At the exit of the process: what looks like a success and is none gets a sentence and an exit code."""
        # An exception has its traceback, and a copy of the process that fork made is not the one that trains.
        if os.getpid() != self._pid or getattr(sys, "last_value", None) is not None:
            return
        missing = self.what_is_missing()
        if not missing:
            return
        _say(missing)
        try:
            if self._session.has_begun:
                self._session.stop(self._left)
        except (RuntimeError, OSError) as error:  # of the collective, the link or the server
            _say(f"and it could not leave the run in good order: {error}")
        self._close()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(UNFINISHED)  # at this point, Python has no other way to end with a code


def _say(sentence: str) -> None:
    print(f"danaz: {sentence}.", file=sys.stderr, flush=True)
