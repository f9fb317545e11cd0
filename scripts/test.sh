#!/usr/bin/env bash
# Runs the tests in the checkout's own environment; arguments go to pytest:  bash scripts/test.sh -k merge
# Those marked slow are left out:  bash scripts/test.sh -m ""  runs them too,  -m slow  runs them alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
exec python -m pytest -m "not slow" "$@"
