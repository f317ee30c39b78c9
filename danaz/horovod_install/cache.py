"""A cache of built wheels for the next set-up.

The file name of a wheel is its key: it contains the versions of Horovod and torch, the hash of the recipe, the Python
and the platform. A second file holds the SHA-256 of the wheel. A wheel that does not match its hash is ignored: it may
be incomplete, altered, or written by another program.
"""

import hashlib
import os
import shutil
from pathlib import Path

from danaz.files.atomic import replacing, write_atomically
from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import Target, full_version

MODE = 0o644  # of the files in a cache, which other users may share


def cache_folder() -> Path:
    """Return `${XDG_CACHE_HOME:-~/.cache}/danaz`. Raises HorovodError."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"], "danaz")
    try:
        return Path.home() / ".cache" / "danaz"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        raise HorovodError(
            "there is no home directory for the cache of wheels; set XDG_CACHE_HOME to a folder"
        ) from None


def find_wheel(target: Target, wheels: Path) -> Path | None:
    """Return the wheel that was built for exactly this target, or None if there is none that matches its hash."""
    wheel = wheels / f"horovod-{full_version(target)}-{target.python_tag}-{target.python_tag}-{target.platform}.whl"
    try:
        return wheel if _sha256(wheel) == _hash_file(wheel).read_text().strip() else None
    except (OSError, UnicodeDecodeError):
        return None


def _hash_file(wheel: Path) -> Path:
    return wheel.with_name(f"{wheel.name}.sha256")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def store_wheel(wheel: Path, wheels: Path) -> Path:
    """Copy a built wheel into the cache and return its path there. An interrupted call leaves no half wheel.

    The hash is written after the wheel. Until then the new wheel has no hash, or an old one, and is ignored.
    """
    wheels.mkdir(parents=True, exist_ok=True)
    stored = wheels / wheel.name
    with replacing(stored, mode=MODE) as part:
        shutil.copyfile(wheel, part)
    write_atomically(_hash_file(stored), f"{_sha256(wheel)}\n".encode(), MODE)
    return stored
