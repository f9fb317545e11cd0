#!/usr/bin/env bash
# Runs the tests in the checkout's own environment; arguments go to pytest:  bash scripts/test.sh -k merge
# Those marked slow are left out:  bash scripts/test.sh -m ""  runs them too,  -m slow  runs them alone.
# Without arguments two processes share the files, since most tests keep one core busy; with GPUs, which tests need for
# themselves, and with arguments one process runs all, in order:  bash scripts/test.sh -n 2 -k merge  asks for two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the ranks are as many as the cores, or more
(($#)) || [[ -e /dev/nvidiactl ]] || set -- -n 2 --dist loadfile
exec python -m pytest -m "not slow" "$@"
