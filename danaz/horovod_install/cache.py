"""Built wheels, kept for the next set-up.

A wheel's own name is its key: it holds Horovod's version, torch's, the recipe's hash, the Python and the platform.
"""

import os
import shutil
import tempfile
from pathlib import Path

from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import Target, full_version


def cache_folder() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/danaz`. Raises HorovodError."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"], "danaz")
    try:
        return Path.home() / ".cache" / "danaz"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        raise HorovodError("you have no home directory; name a folder for built wheels by XDG_CACHE_HOME") from None


def find_wheel(target: Target, wheels: Path) -> Path | None:
    """The wheel built for exactly this target, or None."""
    name = f"horovod-{full_version(target)}-{target.python_tag}-{target.python_tag}-{target.platform}.whl"
    return wheels / name if (wheels / name).is_file() else None


def store_wheel(wheel: Path, wheels: Path) -> Path:
    """Copy a built wheel into the cache, atomically: a reader, or a run cut short, never meets half a wheel."""
    wheels.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=wheels)
    try:
        with os.fdopen(descriptor, "wb") as sink, wheel.open("rb") as source:
            shutil.copyfileobj(source, sink)
        Path(partial).chmod(0o644)  # mkstemp's 0600 would lock out a cache that users share
        os.replace(partial, wheels / wheel.name)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return wheels / wheel.name
