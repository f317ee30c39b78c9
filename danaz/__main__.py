"""``python -m danaz`` is the ``danaz`` command."""

from danaz.cli import main

main()
