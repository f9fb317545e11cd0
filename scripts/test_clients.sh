#!/usr/bin/env bash
# Benchmark clients themselves against a server of four CPU ranks: bash scripts/test_clients.sh [FOLDER]
#
# aiperf and guidellm pin versions that Helix does not have, so each gets an environment of its own in FOLDER (.clients),
# made once. guidellm needs torch: the CPU build comes first, so that no CUDA build is taken.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-.clients}")
cpu=(--extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu')

install() {
    name=$1
    shift
    [ -x "$folder/$name/bin/$name" ] && return
    python3 -m venv "$folder/$name"
    for packages in "$@"; do
        # shellcheck disable=SC2086 # a list of words
        "$folder/$name/bin/pip" install -q $packages
    done
}

install guidellm "${cpu[*]}" "guidellm==0.8.1 ${cpu[*]}"
install aiperf 'aiperf==0.13.0'
HELIX_CLIENTS="$folder" python -m pytest -q -m slow tests/scripts/test_clients.py
