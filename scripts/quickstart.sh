#!/usr/bin/env bash
# The first thing to run: makes a small checkpoint and a prompt below quickstart/, and decodes it on 4 ranks, which use
# GPUs where there are 4 and the CPU elsewhere. Arguments go to scripts/quickstart.py as key=value.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ ! -d quickstart/model ]]; then
    python -m scripts.make_checkpoint quickstart/model.part --family llama --force
    mv quickstart/model.part quickstart/model # whole or not at all, so that a broken-off run is made good by the next
fi
python -c 'import json, pathlib; print(json.dumps({"prompt": pathlib.Path("LICENSE").read_text("utf-8")}))' \
    >quickstart/prompts.jsonl
torchrun --standalone --nproc-per-node 4 -m scripts.quickstart "$@"
