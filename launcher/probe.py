"""What a machine finds out about its way to the hub: `python -m launcher.probe`, started there by `survey`.

The hub is the machine that all others connect to, that of the server or of rank 0.
"""

from __future__ import annotations

import json
import os
import socket

from launcher.checks import address, optional, words

__all__ = ["FIELDS", "HUB", "way_to_hub"]

HUB = "LAUNCHER_HUB"  # address:port, where something listens
TIMEOUT_S = 5.0
FIELDS = {"address": optional(address), "unreachable": optional(words)}  # of what `way_to_hub` returns, checked here


def way_to_hub() -> dict[str, str | None]:
    """`address`: our own on the route to the hub; `unreachable`: why we cannot connect to it, None if we can."""
    address, _, port = os.environ[HUB].rpartition(":")
    try:
        with socket.create_connection((address, int(port)), TIMEOUT_S) as probe:
            return {"address": probe.getsockname()[0], "unreachable": None}
    except OSError as error:
        return {"address": None, "unreachable": str(error)}


if __name__ == "__main__":
    print(json.dumps(way_to_hub()))
