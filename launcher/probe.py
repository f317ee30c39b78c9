"""The probe, `python -m launcher.probe`: `survey` starts it on each machine, and it tests the connection to the hub.

The hub is the machine that all others connect to: that of the server or of rank 0.
"""

from __future__ import annotations

import json
import os
import socket

from launcher.checks import address, optional, words

__all__ = ["FIELDS", "HUB", "way_to_hub"]

HUB = "LAUNCHER_HUB"  # address:port, where something listens
TIMEOUT_S = 5.0
FIELDS = {"address": optional(address), "unreachable": optional(words)}  # how to check what `way_to_hub` returns


def way_to_hub() -> dict[str, str | None]:
    """Return our own `address` on the route to the hub, and why the hub is `unreachable`, or None if it is not."""
    address, _, port = os.environ[HUB].rpartition(":")
    try:
        with socket.create_connection((address, int(port)), TIMEOUT_S) as probe:
            return {"address": probe.getsockname()[0], "unreachable": None}
    except OSError as error:
        return {"address": None, "unreachable": str(error)}


if __name__ == "__main__":
    print(json.dumps(way_to_hub()))
