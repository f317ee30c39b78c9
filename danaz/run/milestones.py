"""Tells the launcher how far a script came, because exit code 0 alone does not say that anything was trained.

The environment of each rank names a file, to which the rank adds a line for each milestone that it reaches. If a rank
ends with 0 before it has reached all of them, it has failed, and the launcher says what it left undone. A rank also
notes when it begins to end: Horovod keeps it running until the other ranks have failed, and without that note the
launcher would blame them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

Milestone = Literal["init", "optimizer", "shard", "finish", "leave"]

VARIABLE = "DANAZ_MILESTONES"

# The milestones in order, each with the message about a script that ended without it.
MISSING: Mapping[str, str] = {
    "init": "it never called danaz.init(): a script takes part in a run by danaz.init(), danaz.DistributedOptimizer, "
    "`for epoch in danaz.epochs(n)` and `for batch in danaz.shard(loader, epoch)`",
    "optimizer": "it never wrapped its optimizer with danaz.DistributedOptimizer(optimizer, model), so that it trained "
    "nothing in this run",
    "shard": "it never iterated over danaz.shard(loader, epoch) within `for epoch in danaz.epochs(n)`, so that it "
    "trained nothing in this run",
    "finish": "it left the run before its end: nothing may end the script before `for epoch in danaz.epochs(n)` has "
    "come to its end, or danaz.finish() was called",
}


def reach(milestone: Milestone) -> None:
    """Tell the launcher, if there is one; "leave" comes last. Raises OSError if the file cannot be written."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, f"{milestone}\n".encode())
    finally:
        os.close(fd)
