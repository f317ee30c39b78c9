"""``python -m danaz`` is the ``danaz`` command."""

import os
import sys

try:
    here = os.getcwd()
except FileNotFoundError:  # main() says so
    here = ""

# `-m` searches the working directory first, where a file of the user's may have the name of something imported here.
if sys.path[0] == here:
    sys.path.append(os.path.dirname(os.path.dirname(__file__)))
    del sys.path[0]

from danaz.cli.main import main

main()
