#!/usr/bin/env bash
# Runs the tests in the checkout's own environment; arguments go to pytest:  bash scripts/test.sh -m "not slow" -k merge
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
exec python -m pytest "$@"
