"""Runs a module of this installation whatever lies in the working directory: `python …/launcher/start.py -m MODULE …`.

`python -m MODULE` looks for every import in the working directory first, so that a file of the user's that has the name
of something which MODULE imports (`rich.py`, `types.py`, `launcher.py`) would be run in its place. Here the folder that
this package lies in is searched last instead, and a working directory that PYTHONPATH names is searched after what is
installed. Nothing is changed for the processes that MODULE starts, nor for what it looks up on purpose.
"""

import os
import sys

__all__ = ["module_command", "search_path"]

FOLDER = os.path.dirname(os.path.abspath(__file__))


def module_command(*words: str) -> list[str]:
    """The command of a process of ours on this machine: a module's name, and its arguments."""
    return [sys.executable, os.path.join(FOLDER, "start.py"), "-m", *words]


def search_path(entries: list[str], here: str) -> list[str]:
    """`entries` without the folder of this file, those that are the directory `here` after all others."""
    installed = os.path.dirname(FOLDER)
    kept = [entry for entry in entries if entry and os.path.abspath(entry) != FOLDER]
    if installed not in kept:
        kept.append(installed)
    return sorted(kept, key=lambda entry: os.path.realpath(entry) == here)


def working_directory() -> str:
    """Without links; an empty text if it has been deleted."""
    try:
        return os.path.realpath(os.getcwd())
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    # Before anything else is imported: what is named here may lie in the working directory, or beside this file.
    sys.path[:] = search_path(sys.path, working_directory())
    import runpy

    del sys.argv[:2]  # this file and -m
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
