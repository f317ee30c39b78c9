#!/bin/sh
# Check that the system has what danaz needs, before anything is installed, so that set-up does not fail half-way.
# usage: check_prerequisites.sh [python]
set -u
python=${1:-python3}
missing=    # what is missing, as lines of text
debian=     # the packages that contain it
fedora=

lacks() { missing="${missing}  - $1
"; debian="$debian $2"; fedora="$fedora $3"; }

if [ "$(uname -s)" != Linux ]; then
    echo "error: danaz runs on Linux; this is $(uname -s)." >&2
    exit 1
fi

if ! command -v "$python" >/dev/null 2>&1; then
    lacks "Python >= 3.10 ('$python' was not found)" "python3 python3-venv python3-dev" "python3 python3-devel"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: Python >= 3.10 is needed, but '$python' is $("$python" -V 2>&1)." >&2
    echo "Install a newer one and name it, for example: make setup PYTHON=python3.12" >&2
    exit 1
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        lacks "Python's venv and ensurepip modules" "python3-venv" "python3"
    "$python" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
        lacks "Python's headers (Python.h)" "python3-dev" "python3-devel"
fi

if ! command -v g++ >/dev/null 2>&1; then
    lacks "g++ >= 11, which compiles Horovod" "g++" "gcc-c++"
elif version=$(g++ -dumpversion) && [ "${version%%.*}" -lt 11 ]; then
    lacks "g++ >= 11: torch's headers are C++20, and 'g++' is version $version" "g++" "gcc-c++"
fi
command -v make >/dev/null 2>&1 || lacks "make" "make" "make"

if [ -n "$missing" ]; then
    printf 'error: danaz needs these from the system, and they are missing:\n%s' "$missing" >&2
    echo "Install them, then run this again:" >&2
    echo "  Debian, Ubuntu:  apt-get install$debian" >&2
    echo "  Fedora, RHEL:    dnf install$fedora" >&2
    exit 1
fi
