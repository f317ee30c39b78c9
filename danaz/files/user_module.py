"""Modules of the user's own, named in a config or on the command line: rules, and models and data too."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType


def import_user_module(name: str) -> ModuleType:
    """Import ``name``, looked for in the working directory first, as ``python -m`` does. Raises ImportError.

    Afterwards the directory is searched last: what danaz imports later is never a file there that has its name.
    """
    here = os.getcwd()
    if here in sys.path:
        return import_module(name)
    sys.path.insert(0, here)
    try:
        return import_module(name)
    finally:
        sys.path.remove(here)
        sys.path.append(here)
