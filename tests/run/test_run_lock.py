"""Two servers never write the same folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from danaz.run.lock import RunLockedError, lock_server

HOLD = "import sys; from pathlib import Path; from danaz.run.lock import lock_server; lock_server(Path(sys.argv[1]))"


def test_a_server_waits_for_another_whose_lock_the_kernel_frees(tmp_path: Path) -> None:
    hold = [sys.executable, "-c", f"{HOLD}; print(flush=True); sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunLockedError, match="another server writes"):
            lock_server(tmp_path, wait_s=0.1)
        other.kill()
    os.close(lock_server(tmp_path, wait_s=0.1))
