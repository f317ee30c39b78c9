"""How a process's part in a run ends if its script does not end it properly.

The script may have left its loop, it may exit in the middle of a run, or it may never have trained.
"""

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

UNFINISHED = 64  # exit code of a process that ends in the middle of a run, or has not trained (EX_USAGE)


class Part(Protocol):
    """One process's part in a run, with what its ending must know about it."""

    place: RankInfo
    loop: Loop
    finished: bool

    @property
    def optimizer(self) -> DistributedOptimizer:
        """The wrapped optimizer. Raises NotInitializedError if there is none."""

    @property
    def has_optimizer(self) -> bool:
        """Whether the script has wrapped its optimizer."""

    @property
    def has_begun(self) -> bool:
        """Whether this process has entered the run."""

    @property
    def came_late(self) -> bool:
        """Whether the run was over before this process entered it."""

    def stop(self, reason: str) -> None:
        """End the run in good order for every worker."""


class Ending:
    """Ends one process's part in a run in good order, or makes sure that it does not look like a success.

    When a loop is left, ``break`` looks the same as an exception. Only when the script goes on can they be told apart.
    """

    def __init__(self, session: Part, close: Callable[[], None]):
        self._session = session
        self._close = close
        self._pid = os.getpid()
        self._watches: list[RemovableHandle] = []  # hooks on the model, set once the script has left its loop

    def watch(self) -> None:
        """Watch from now on whether the script uses the model after it has left the loop over epochs."""
        session = self._session
        if session.finished or not session.has_begun:
            return
        for module in session.optimizer.flat.model.modules():
            self._watches.append(module.register_forward_pre_hook(lambda *_: self.end_if_left()))
            watch = module.register_state_dict_pre_hook(lambda *_: self.end_if_left())  # type: ignore[no-untyped-call]
            self._watches.append(watch)

    def stop_watching(self) -> None:
        """Stop watching, because the model is now the trained one."""
        for watch in self._watches:
            watch.remove()
        self._watches.clear()

    def end_if_left(self) -> None:
        """End the run if the script has left its loop and goes on, and no exception is being handled."""
        session = self._session
        if session.loop.was_left and session.has_begun and not session.finished and sys.exc_info()[1] is None:
            _say(f"{self._left}; the run ends here for every worker. To say so, and why, call danaz.stop(reason) first")
            session.stop(self._left)

    @property
    def _left(self) -> str:
        return f"the script left its loop in epoch {self._session.loop.reached} of {self._session.loop.count}"

    def what_is_missing(self) -> str:
        """Return what this process should have done before its end, but has not; empty if nothing is missing."""
        session = self._session
        if session.finished or session.came_late:
            return ""
        if session.has_begun:
            return (
                f"{self._left} and ended before the run was over. To end a run early, call danaz.stop(reason) in the "
                "loop"
            )
        if not session.place.launched:
            return ""  # a process alone need not train
        calls = {
            "danaz.DistributedOptimizer(optimizer, model)": session.has_optimizer,
            "danaz.epochs(N)": session.loop.count is not None,
            "danaz.shard(loader, epoch)": False,
        }
        missing = ", ".join(call for call, is_made in calls.items() if not is_made)
        return f"the script ended without training: it calls danaz.init(), but never came to {missing}"

    def end_process(self) -> None:
        """At the exit of the process, print a sentence and set an exit code if it would wrongly look like a success."""
        # An exception prints its own traceback. A process that was forked off is not the one that trains.
        if os.getpid() != self._pid or getattr(sys, "last_value", None) is not None:
            return
        missing = self.what_is_missing()
        if not missing:
            return
        _say(missing)
        try:
            if self._session.has_begun:
                self._session.stop(self._left)
        except (RuntimeError, OSError) as error:  # raised by the collective, the link or the server
            _say(f"and it could not leave the run in good order: {error}")
        self._close()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(UNFINISHED)  # at this point, Python has no other way to set the exit code


def _say(sentence: str) -> None:
    print(f"danaz: {sentence}.", file=sys.stderr, flush=True)
