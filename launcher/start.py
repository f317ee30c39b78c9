"""Runs a module of this installation, whatever is in the working directory: `python …/launcher/start.py -m MODULE …`.

`python -m MODULE` looks for every import in the working directory first. If the user has a file there with the name of
something that MODULE imports (`rich.py`, `types.py`, `launcher.py`), Python would run that file instead. Here, the
working directory is not searched; the folder of this package is searched last. If PYTHONPATH names the working
directory, that is searched after the installed packages. Nothing changes for the processes that MODULE starts, nor for
files that it looks up on purpose.
"""

import os
import sys

__all__ = ["module_command", "search_path"]

FOLDER = os.path.dirname(os.path.abspath(__file__))


def module_command(*words: str) -> list[str]:
    """Return the command that runs one of our modules here; `words` are the module's name and its arguments."""
    return [sys.executable, os.path.join(FOLDER, "start.py"), "-m", *words]


def search_path(entries: list[str], here: str) -> list[str]:
    """Return `entries` without the folder of this file; entries that are the directory `here` come last."""
    installed = os.path.dirname(FOLDER)
    kept = [entry for entry in entries if entry and os.path.abspath(entry) != FOLDER]
    if installed not in kept:
        kept.append(installed)
    return sorted(kept, key=lambda entry: os.path.realpath(entry) == here)


def working_directory() -> str:
    """Return the working directory without links; an empty string if it has been deleted."""
    try:
        return os.path.realpath(os.getcwd())
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    # Do this before any other import, because a file of that name may be in the working directory or beside this file.
    sys.path[:] = search_path(sys.path, working_directory())
    import runpy

    del sys.argv[:2]  # this file and -m
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
