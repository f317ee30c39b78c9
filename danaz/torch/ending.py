"""Parts for the end of a process: a watch on the model, a sentence for the user, and the exit code of a failure."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from torch import nn
from torch.utils.hooks import RemovableHandle

UNFINISHED = 64  # exit code of a process that ends in the middle of a run, or has not trained (EX_USAGE)


class ModelWatch:
    """Calls ``on_use`` each time that the script computes with the model or saves it."""

    def __init__(self, on_use: Callable[[], None]):
        self._on_use = on_use
        self._hooks: list[RemovableHandle] = []

    def begin(self, model: nn.Module) -> None:
        """Watch the model and each of its parts."""
        for module in model.modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_: self._on_use()))
            hook = module.register_state_dict_pre_hook(lambda *_: self._on_use())  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def say(sentence: str) -> None:
    """Print a sentence for the person who reads the process's output."""
    print(f"danaz: {sentence}", file=sys.stderr, flush=True)


def exit_unfinished() -> NoReturn:
    """End this process with exit code UNFINISHED. In an atexit handler, Python has no other way to set the code."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(UNFINISHED)
