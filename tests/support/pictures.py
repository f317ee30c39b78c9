"""The pictures in docs/state-machines.md, drawn from the tables of transitions.

After you change a table, draw the page again: ``PYTHONPATH=. python tests/support/pictures.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from danaz.protocol.transitions import Transitions
from danaz.server.members import MEMBER
from danaz.worker.states import WORKER_TRANSITIONS

PAGE = Path(__file__).parents[2] / "docs" / "state-machines.md"
TABLES: dict[str, Transitions[Any, Any]] = {"member": MEMBER, "worker": WORKER_TRANSITIONS}


def drawn(page: str) -> str:
    """Return ``page`` with each picture drawn from its table. Raises KeyError for a picture without a table."""

    def block(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- picture of {name} -->\n```mermaid\n{TABLES[name].picture()}\n```\n<!-- end of picture -->"

    return re.sub(r"<!-- picture of (\w+) -->.*?<!-- end of picture -->", block, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
