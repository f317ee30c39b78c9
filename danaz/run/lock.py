"""Decides who may write a run folder: one process that begins or resumes a run, and one server for that run.

A new run claims its folder before it does anything else. It makes the folder, which only one process can do, or takes
one that holds no files of a run. It keeps a lock there until it ends, in whatever way. Nobody begins another run in a
folder that holds files of a run.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

LOCK = ".run.lock"  # of the process that began the run
SERVER_LOCK = ".server.lock"
WAIT_S = 20.0  # the server of a killed launcher may need this long to end
SHORTLY_S = 0.5  # whoever asks whether a lock is held takes it for a moment
POLL_S = 0.05
MODE = 0o700  # of a new run folder: the model, its figures and the server's address are private
LONGEST_NAME = 100

SERVERS = re.compile(r"updates\.jsonl|(summary|curves)\.json|parameters\.safetensors|recording.*\.bin|checkpoints")
BEGUN = re.compile(r"config\.yaml|launch\.yaml")
OTHER = re.compile(r"checkpoints\.[0-9]+|logs|invitations|comparison\.yaml|cells")


class RunFolderError(ValueError):
    """The run folder cannot be used."""


class RunLockedError(RunFolderError):
    """Another process uses the run folder."""


# ---- a run -------------------------------------------------------------------------------------------------------


def free_run_folder(out: Path | None, name: str) -> Path:
    """Return the folder that a new run may use now, ``out`` or runs/TIME-NAME. Raises RunFolderError if it is taken."""
    if out is None:
        return next(path for path in _names(name) if not path.exists())
    if out.is_dir():
        _check_free(out)
    return out


@contextmanager
def claimed_run_folder(out: Path | None, name: str) -> Iterator[Path]:
    """Yield the folder of a new run, ``out`` or runs/TIME-NAME, which only this process may use during the block.

    The folder is made, with mode 0700, unless ``out`` exists and holds no files of a run. If it was made and the block
    leaves nothing in it, it is removed. Raises RunFolderError.
    """
    folder, is_new = _make(out, name)
    if not is_new and folder.is_dir() and not _is_locked(folder / LOCK):
        _check_free(folder)  # before a lock is put into a folder that is not ours
    with locked_run_folder(folder):
        try:
            _check_free(folder)
            yield folder
        finally:
            if is_new:
                _remove_if_empty(folder)


@contextmanager
def locked_run_folder(folder: Path, wait_s: float = SHORTLY_S) -> Iterator[None]:
    """Keep every other run out of ``folder`` during the block. Touch nothing in it but the lock.

    Raises RunLockedError if another run is going on there and does not end within ``wait_s``; RunFolderError.
    """
    lock = folder / LOCK
    try:
        descriptor = _lock(lock, wait_s)
    except BlockingIOError as error:
        raise RunLockedError(
            f"a run is going on in {folder}{_holder(lock)}; wait until it has ended, or choose another folder"
        ) from error
    except OSError as error:
        raise RunFolderError(f"the run folder {folder} cannot be used: {error.strerror}") from None
    with suppress(OSError):  # this only helps others, and fails on a full disk
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    try:
        yield
    finally:
        os.close(descriptor)


def _make(out: Path | None, name: str) -> tuple[Path, bool]:
    """Make the folder unless ``out`` exists. Return it, and whether it is new."""
    for folder in _names(name) if out is None else [out]:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"the run folder {folder} cannot be made: {_reason(error)}") from None
        try:
            folder.mkdir(MODE)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunFolderError(f"the run folder {folder} cannot be made: {_reason(error)}") from None
        return folder, True
    assert out is not None  # the names never end
    return out, False


def _names(name: str) -> Iterator[Path]:
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:LONGEST_NAME]}"
    return (Path("runs", f"{stem}-{number}" if number else stem) for number in count())


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}"


def _check_free(folder: Path) -> None:
    """Raise RunFolderError if ``folder`` holds any file of a run."""
    check_free_of(folder, SERVERS, BEGUN, OTHER)


def check_free_of(folder: Path, *kinds: re.Pattern[str]) -> None:
    """Raise RunFolderError if ``folder`` holds a file of a run of one of these kinds."""
    try:
        found = sorted(name for name in os.listdir(folder) if any(kind.fullmatch(name) for kind in kinds))
    except OSError as error:
        raise RunFolderError(f"the run folder {folder} cannot be used: {error.strerror}") from None
    if found:
        raise RunFolderError(
            f"{folder} already holds a run ({', '.join(found)}); choose another folder, or move this one away"
        )


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is gone already, or holds something by now
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


# ---- a server ----------------------------------------------------------------------------------------------------


def lock_server(run: Path, wait_s: float = WAIT_S, shard: int = 0) -> int:
    """Wait until no other server of this shard writes ``run``, and keep others out until this process ends.

    Return the descriptor that holds the lock. Raises RunLockedError, OSError.
    """
    try:
        return _lock(run / (f"{SERVER_LOCK}.{shard}" if shard else SERVER_LOCK), wait_s)
    except BlockingIOError:
        raise RunLockedError(f"another server writes {run}; end that run, or choose another folder") from None


def check_server_begins(run: Path, shard: int = 0) -> None:
    """Raise RunFolderError if ``run`` holds files that a server wrote, or a run whose process has ended."""
    if shard:
        return check_free_of(run, re.compile(rf"checkpoints\.{shard}"))
    check_free_of(run, SERVERS)
    if not _is_locked(run / LOCK):
        check_free_of(run, BEGUN)
    return None


# ---- locks -------------------------------------------------------------------------------------------------------


def _lock(path: Path, wait_s: float) -> int:
    """Lock a file; return its descriptor. Raises OSError; BlockingIOError if it is locked for ``wait_s``."""
    deadline = time.monotonic() + wait_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_at(path, descriptor):
                return descriptor
            os.close(descriptor)  # its last holder has removed the file meanwhile
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise
            time.sleep(POLL_S)
        except OSError:
            os.close(descriptor)
            raise


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_locked(path: Path) -> bool:
    """Return whether a process holds the lock. Make no file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _holder(path: Path) -> str:
    try:
        text = path.read_text(errors="replace")[:LONGEST_NAME]
    except OSError:
        return ""
    return f" ({text})" if text else ""
