#!/usr/bin/env bash
# Asks a running server (scripts.serve) with curl:  bash examples/completions.sh [URL]
# A key, where the server wants one, is taken from HELIX_API_KEY.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
ask() { curl -sS --fail-with-body -H "Authorization: Bearer ${HELIX_API_KEY:-}" -H "Content-Type: application/json" "$@"; echo; }

ask "$url/v1/models"
ask "$url/v1/completions" -d '{"prompt": "The capital of France is", "max_tokens": 8}'
ask -N "$url/v1/chat/completions" \
    -d '{"messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 32, "stream": true}'
